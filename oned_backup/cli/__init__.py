"""The command `oned-backup`."""
