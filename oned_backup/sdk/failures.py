"""From any exception to the error whose exit code tells the daemon what to do next."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from oned_backup.errors import (
    DriverBug,
    DriverFailed,
    NoSpace,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
)

_FULL = {errno.ENOSPC, errno.EDQUOT}
#: whether the thing exists is not known after these
_UNREACHABLE = {
    errno.ESTALE,
    errno.EIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EREMOTEIO,
    errno.ENODEV,
    errno.ENXIO,
}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_EXHAUSTED = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_KINDS: tuple[tuple[set[int], type[OnedBackupError]], ...] = (
    (_UNREACHABLE, Unavailable),
    (_DENIED, PermissionDenied),
    (_EXHAUSTED, DriverFailed),
)


@dataclass(frozen=True)
class Space:
    """Where an action writes and how much: what a NoSpace error tells besides the fact."""

    path: Path
    needed_bytes: int

    def free_bytes(self) -> int:
        """What an unprivileged writer may still use there."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize


def explain(error: BaseException, space: Space | None = None) -> OnedBackupError:
    """The error to report for `error`; `DriverBug` for what no driver should let through."""
    if isinstance(error, OnedBackupError):
        return error
    if isinstance(error, BrokenPipeError):
        return DriverFailed("whoever read the output has gone")
    if isinstance(error, MemoryError):
        return DriverFailed("out of memory")
    if isinstance(error, TimeoutError) and error.errno is None:
        return Unavailable(str(error) or "timed out")
    if isinstance(error, OSError):
        return _explain_os_error(error, space)
    return DriverBug(f"{type(error).__name__}: {error}")


def no_space(space: Space, free_bytes: int, *, quota: bool = False) -> NoSpace:
    """The error for a full store, with its numbers in MB."""
    needed, free = -(-space.needed_bytes >> 20), free_bytes >> 20
    what = "quota exceeded, " if quota else ""
    return NoSpace(
        f"{space.path}: {what}{needed} MB needed, {free} MB free",
        hint="Delete backups that are no longer needed, or make the store larger.",
    )


def _explain_os_error(error: OSError, space: Space | None) -> OnedBackupError:
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{os.strerror(error.errno) if error.errno else error}"
    if error.errno in _FULL:
        return _explain_full(text, space, quota=error.errno == errno.EDQUOT)
    for numbers, kind in _KINDS:
        if error.errno in numbers:
            return kind(text)
    return DriverBug(f"{type(error).__name__}: {text}")


def _explain_full(text: str, space: Space | None, *, quota: bool) -> NoSpace:
    if space is None:
        return NoSpace(text)
    try:
        return no_space(space, space.free_bytes(), quota=quota)
    except OSError:
        return NoSpace(text)
