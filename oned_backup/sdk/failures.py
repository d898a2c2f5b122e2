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
_WITHOUT_NUMBER: tuple[tuple[type[BaseException], OnedBackupError], ...] = (
    (MemoryError, DriverFailed("out of memory")),
    (TimeoutError, Unavailable("timed out")),
)
#: by name, because few drivers load these modules; the first that fits counts
_OF_THE_NETWORK: tuple[tuple[str, type[OnedBackupError]], ...] = (
    ("ssl.SSLCertVerificationError", PermissionDenied),
    ("ssl.SSLError", Unavailable),
    ("socket.gaierror", Unavailable),
    ("http.client.HTTPException", Unavailable),
)
_HTTP_DENIED = {401, 403, 407}
_HTTP_FULL = {413, 507}
_HTTP_LATER = {408, 425, 429}


@dataclass(frozen=True)
class SpaceNeeded:
    """Where an action writes and how much: what a NoSpace error tells besides the fact."""

    path: Path
    needed_bytes: int

    def free_bytes(self) -> int:
        """What an unprivileged writer may still use there."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize


def explain(error: BaseException, space: SpaceNeeded | None = None) -> OnedBackupError:
    """The error to report for `error`; `DriverBug` for what no driver should let through."""
    if isinstance(error, NoSpace) and error.hint is None:  # the data engine knows no numbers
        return _explain_full(error.message, space, quota=False)
    if isinstance(error, OnedBackupError):
        return error
    found = _explain_network_error(error, space)
    if found is not None:
        return found
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_os_error(error, space)
    for kind, explained in _WITHOUT_NUMBER:
        if isinstance(error, kind):
            return explained
    return DriverBug(f"{type(error).__name__}: {error}")


def no_space(space: SpaceNeeded, free_bytes: int, *, quota: bool = False) -> NoSpace:
    """The error for a full store or target, with its numbers in MB."""
    needed, free = -(-space.needed_bytes >> 20), free_bytes >> 20
    if quota:
        what = "quota exceeded, "
    elif free_bytes >= space.needed_bytes:
        what = "no room for another file, "  # inodes, or the limit of a project or subvolume
    else:
        what = ""
    return NoSpace(
        f"{space.path}: {what}{needed} MB needed, {free} MB free",
        hint="Make room there, or use a larger file system.",
    )


def _explain_os_error(error: OSError, space: SpaceNeeded | None) -> OnedBackupError:
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{os.strerror(error.errno or 0)}"
    if isinstance(error, BrokenPipeError):
        return DriverFailed("whoever read the output has gone")
    if error.errno in _FULL:
        return _explain_full(text, space, quota=error.errno == errno.EDQUOT)
    for numbers, kind in _KINDS:
        if error.errno in numbers:
            return kind(text)
    return DriverBug(f"{type(error).__name__}: {text}")


def _explain_network_error(error: BaseException, space: SpaceNeeded | None) -> OnedBackupError | None:
    """What Python's modules for TLS, names and HTTP raise; the numbers of most are not the system's."""
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if "urllib.error.HTTPError" in kinds:
        return _explain_http_status(getattr(error, "code", 0), str(error))
    if "urllib.error.URLError" in kinds:
        reason = getattr(error, "reason", None)
        return explain(reason, space) if isinstance(reason, BaseException) else Unavailable(str(reason))
    for name, kind in _OF_THE_NETWORK:
        if name in kinds:
            return kind(f"{type(error).__name__}: {error}")
    if isinstance(error, ConnectionError) and error.errno is None:
        return Unavailable(str(error) or "the connection broke")
    return None


def _explain_http_status(status: int, text: str) -> OnedBackupError:
    """A status that the driver did not expect: 404 is no proof of absence when nobody asked for a thing."""
    if status in _HTTP_DENIED:
        return PermissionDenied(text)
    if status in _HTTP_FULL:
        return NoSpace(text, hint="Make room there.")
    return Unavailable(text) if status in _HTTP_LATER or status >= 500 else DriverFailed(text)


def _explain_full(text: str, space: SpaceNeeded | None, *, quota: bool) -> NoSpace:
    if space is None:
        return NoSpace(text)
    try:
        return no_space(space, space.free_bytes(), quota=quota)
    except OSError:
        return NoSpace(text)
