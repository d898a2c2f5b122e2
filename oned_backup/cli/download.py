"""The command `oned-backup download`: a disk by its URL, or a whole restore point."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from oned_backup.cli import follow, output
from oned_backup.cli.image import Salvage, show_restored
from oned_backup.cli.session import Json, client
from oned_backup.client import begin_download, is_restore_point
from oned_backup.errors import InvalidInput, NoSpace, OnedBackupError

_COPY_BYTES = 1024 * 1024


def download(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL|IMAGE[:INCREMENT]",
            help="Pseudo-URL of a disk (`image ls` prints them), or a whole restore point.",
        ),
    ],
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="A file, a block device, HOST:/PATH for a new file there, or - for standard output;"
            " a directory or HOST:/DIRECTORY for a restore point.",
        ),
    ],
    image_format: Annotated[str, typer.Option("--format", help="qcow2 or raw.")] = "raw",
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write over what is there.")] = False,
    salvage: Salvage = False,
    json: Json = False,
) -> None:
    """Restore a disk by its URL, or a restore point. All disks of it side by side."""
    whole = is_restore_point(url)
    if whole and target == "-":
        raise InvalidInput(
            f"restore point {url} is several files: name a directory",
            hint="`image ls` has the pseudo-URL of each disk; one disk may go to standard output.",
        )
    if target == "-":
        _download_to_stdout({"url": url, "format": image_format, "salvage": salvage})
        return
    api = client()
    operation = begin_download(
        api, url, target, image_format=image_format, overwrite=overwrite, salvage=salvage
    )
    show = show_restored if whole else _show_downloaded
    follow.conclude(api, operation, wait=True, as_json=json, show=show)


def _show_downloaded(operation: Mapping[str, Any]) -> None:
    output.say(f"{operation['result']['target']}: restored in {follow.elapsed(operation)}")


def _download_to_stdout(body: Mapping[str, Any]) -> None:
    """The daemon's driver writes into a FIFO of ours; what comes out goes to stdout."""
    api = client()
    directory = Path(tempfile.mkdtemp(prefix="oned-backup-"))
    try:
        fifo = directory / "stream"
        os.mkfifo(fifo, 0o600)
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        ended = threading.Event()
        operation = api.post("downloads", {**body, "target": str(fifo)})
        trouble: list[OSError] = []

        def lose(error: OSError) -> None:
            trouble.append(error)
            with suppress(OnedBackupError):
                api.post(f"operations/{operation['id']}/cancel")

        copier = threading.Thread(target=_copy_to_stdout, args=(reader, ended, lose), daemon=True)
        copier.start()
        # Once this command is gone, nobody reads what the operation writes.
        finished = follow.follow(api, operation, quiet=sys.stdout.isatty(), goes_on=False)
        ended.set()
        copier.join()
        if trouble and isinstance(trouble[0], BrokenPipeError):
            raise trouble[0]
        if trouble:
            kind = NoSpace if trouble[0].errno == errno.ENOSPC else OnedBackupError
            raise kind(f"standard output: {trouble[0].strerror}")
        follow.conclude(api, finished, wait=True, as_json=False, show=lambda _view: None)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _copy_to_stdout(reader: int, ended: threading.Event, lose: Callable[[OSError], None]) -> None:
    """Copy until the writer has come and gone, or the operation has ended without one.

    `lose` is told what goes wrong with standard output, before the writer is.
    """
    import select  # noqa: PLC0415 - only here

    poller = select.poll()
    poller.register(reader, select.POLLIN)
    try:
        while True:
            events = dict(poller.poll(100)).get(reader, 0)
            if events & select.POLLIN:
                view = memoryview(os.read(reader, _COPY_BYTES))
                while view:
                    view = view[os.write(sys.stdout.fileno(), view) :]
            elif events & select.POLLHUP or ended.is_set():
                return
    except OSError as error:
        lose(error)
    finally:
        os.close(reader)
