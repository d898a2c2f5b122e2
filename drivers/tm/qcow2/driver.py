"""Transfer manager for images behind this machine's libvirt, or one that is reached by SSH."""

from __future__ import annotations

from oned_backup.transfer.driver import ImageDriver

DRIVER = ImageDriver()
