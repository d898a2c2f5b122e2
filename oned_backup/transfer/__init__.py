"""What transfer managers for images on a libvirt host have in common.

A driver folder for local, shared or remote images differs in where its host is
(`hypervisor.host`); which disks are exported, from when, and how all that is
undone again is the same, and stands here.
"""
