"""The data engine: everything that moves the bytes of a disk."""
