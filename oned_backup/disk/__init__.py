"""The data engine: everything that moves a disk's bytes.

It knows nothing of virtual machines, datastores or XML. `image` turns an NBD
export into the bytes of a qcow2 file, `chain` shows full backup and increments
as one disk, `restore` writes that disk, `scrub` proves stored files.
"""
