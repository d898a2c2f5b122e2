"""Transfer manager for images on the hypervisors' own disks, copied when a VM moves."""

from __future__ import annotations

from oned_backup.transfer.driver import ImageDriver

DRIVER = ImageDriver()
