"""Downloads of a disk or of a whole restore point, by what users call them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oned_backup.client.connection import Client
from oned_backup.client.waiting import error_of, wait_for_end
from oned_backup.errors import InvalidInput
from oned_backup.places import daemon_socket

_RESTORE_POINT = re.compile(r"(?P<image>[0-9]{1,9})(?::(?P<increment>[0-9]{1,9}))?")
_ELSEWHERE = re.compile(r"(?P<host>[^/:]+):(?P<path>/.*)")


def download(
    url: str,
    target: Path | str,
    *,
    image_format: str = "raw",
    overwrite: bool = False,
    salvage: bool = False,
    settings: Path | None = None,
) -> Mapping[str, Any]:
    """Where the disk, or the restore point, lies now: `target` or `placed` of the finished operation.

    `target`: a file, a block device or a directory, also `HOST:/PATH`. `salvage`: what cannot be proved
    is zero and listed as `salvaged`; without it, `DataCorrupt` is raised. `settings`: the daemon's file.
    """
    api = Client(daemon_socket(settings))
    operation = begin_download(
        api, url, str(target), image_format=image_format, overwrite=overwrite, salvage=salvage
    )
    ended = wait_for_end(api, operation)
    if ended["state"] != "DONE":
        raise error_of(ended)
    result: Mapping[str, Any] = ended["result"]
    return result


def is_restore_point(url: str) -> bool:
    """Whether `IMAGE[:INCREMENT]` is meant, and no pseudo-URL."""
    return _RESTORE_POINT.fullmatch(url) is not None


def begin_download(
    api: Client, url: str, target: str, *, image_format: str, overwrite: bool, salvage: bool
) -> Mapping[str, Any]:
    """The operation that downloads a disk or a whole restore point to `target`."""
    body: dict[str, Any] = {"format": image_format, "salvage": salvage}
    elsewhere = _ELSEWHERE.fullmatch(target)
    path = elsewhere["path"] if elsewhere else str(Path(target).absolute())
    if elsewhere is None and ":" in target.partition("/")[0]:
        raise InvalidInput(
            f"'{target[:200]}': the path on a host begins with a slash",
            hint="A file of that name in this directory is ./NAME.",
        )
    point = _RESTORE_POINT.fullmatch(url)
    if overwrite and (elsewhere or point):
        raise InvalidInput(
            "--overwrite is for one disk on this machine: nothing else is ever replaced",
            hint="Name a path that is free, or remove what is there first.",
        )
    if elsewhere:
        body["host_id"] = api.resolve("host", elsewhere["host"])
    operation: Mapping[str, Any]
    if point is None:
        operation = api.post("downloads", {**body, "url": url, "target": path, "overwrite": overwrite})
    else:
        increment = None if point["increment"] is None else int(point["increment"])
        operation = api.post(
            f"images/{int(point['image'])}/restore", {**body, "to": path, "increment_id": increment}
        )
    return operation
