"""The hypervisor: libvirt's domains, their change tracking, freezing and backup jobs.

A leaf: it knows nothing of VMs in our sense, of backups or of drivers, only of
domains, disks and images. Only driver processes import it, because libvirt
may hang.
"""
