"""A directory of another machine, shown here to be read: sshfs, for stores whose files lie elsewhere.

    with shown("backup@server:/backups", directory) as folder: …

Only what is read travels, when it is read. The mount ends with the block; if we
are killed sshfs ends too, and fusermount3, which outlives both, takes the mount away.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from oned_backup.errors import Cancelled, Misconfigured, OnedBackupError, Unavailable
from oned_backup.sdk import fuse
from oned_backup.sdk.publish import Folder
from oned_backup.sdk.ssh import config_path, failed

_MOUNT_S = 60.0
_LOOK_S = 0.005
_END_S = 5.0
#: links stay links, so that nobody follows them; what lies in a store does not change while it is read
_OPTIONS = "ro,nosuid,nodev,auto_unmount,kernel_cache"


@contextmanager
def shown(source: str, directory: Path, name: Path) -> Iterator[Folder]:
    """The directory `source` (`user@host:/path`), mounted at `directory`; `name` is for messages.

    `Unavailable` if the host or the directory is not to be had, or the connection breaks
    meanwhile; `Misconfigured` if there is no sshfs here or no sftp there.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fuse.unmount(directory)  # what a killed driver may have left
    with tempfile.TemporaryFile() as words:
        process = _start(source, directory, words)
        try:
            with Folder(_opened(process, source, directory, words), name) as folder:
                try:
                    yield folder
                except (OSError, OnedBackupError) as error:
                    if not isinstance(error, Cancelled):
                        _require_connection(folder, error)
                    raise
                _require_connection(folder, None)
        finally:
            _end(process, directory)


def _start(source: str, directory: Path, words: IO[bytes]) -> subprocess.Popen[bytes]:
    argv = ["sshfs", "-f", "-F", str(config_path()), "-o", _OPTIONS, "--", source, str(directory)]
    nothing = subprocess.DEVNULL
    try:
        return subprocess.Popen(argv, stdin=nothing, stdout=nothing, stderr=words)
    except FileNotFoundError as error:
        raise Misconfigured("sshfs is not installed", hint="Install the package sshfs.") from error


def _opened(process: subprocess.Popen[bytes], source: str, directory: Path, words: IO[bytes]) -> int:
    """The mounted directory, when the connection stands: sshfs mounts first, and connects then."""
    end = time.monotonic() + _MOUNT_S
    while not fuse.is_mounted(directory) and process.poll() is None:
        if time.monotonic() > end:
            raise Unavailable(f"sshfs of {source}: not mounted after {_MOUNT_S:g} s")
        time.sleep(_LOOK_S)
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):
            os.statvfs(descriptor)  # asks the server
            if fuse.is_mounted(directory):
                return descriptor
        os.close(descriptor)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    words.seek(0)
    raise _explain(source, words.read())


def _explain(source: str, words: bytes) -> OnedBackupError:
    target = source.partition(":/")[0]
    text = words.decode("utf-8", "replace")
    if "No such file or directory" in text or "Not a directory" in text:
        return Unavailable(f"{source} is not there")
    if "subsystem request failed" in text:
        return Misconfigured(
            f"{target} has no sftp", hint="Put `Subsystem sftp internal-sftp` into its sshd_config."
        )
    return failed(target, words)


def _require_connection(folder: Folder, error: Exception | None) -> None:
    """Whatever was read or not: it means nothing if the other machine is gone."""
    try:
        os.statvfs(folder.descriptor)  # asks the server
    except OSError as lost:
        raise Unavailable(f"{folder.path}: the connection broke") from error or lost


def _end(process: subprocess.Popen[bytes], directory: Path) -> None:
    fuse.unmount(directory)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
