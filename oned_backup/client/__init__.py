"""The daemon's client, for the command line and for Python programs.

    from oned_backup.client import download

    download("fs://100/-/0:20261121-023700-1f2e3d/7/disk.0", "/srv/disk.raw")
    download("rsync://100//0:a78156,1:c1a00b/var/lib/one/datastores/100/13/c1a00b/disk.0.1", "hv2:/srv/d")
    download("3:1", "/srv/point")                    # all of increment 1 of image 3

Errors are those of `oned_backup.errors`, raised here as what they were in the daemon.
"""

from oned_backup.client.connection import Client, error_from
from oned_backup.client.downloads import begin_download, download, is_restore_point
from oned_backup.client.waiting import error_of, wait_for_end

__all__ = [
    "Client",
    "begin_download",
    "download",
    "error_from",
    "error_of",
    "is_restore_point",
    "wait_for_end",
]
