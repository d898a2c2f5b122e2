"""Libvirt: domains, checkpoints, backup jobs, freeze and thaw."""
