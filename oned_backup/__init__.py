"""Incremental backup and proved restore of KVM/libvirt virtual machines."""

__version__ = "0.1.0"
