"""Transfer manager for images on storage that all hypervisors see at the same path."""

from __future__ import annotations

from oned_backup.transfer.driver import ImageDriver

DRIVER = ImageDriver()
