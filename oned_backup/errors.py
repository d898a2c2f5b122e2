"""Everything that can go wrong, as one table.

Each error has the exit code by which a driver reports it to the daemon and the
command line reports it to its caller, so that an error crosses a process
border and comes out as the same class (`error_for_exit_code`). The codes 64 to
78 are those of sysexits.h: the codes that rsync, restic, qemu-img and ssh use
for themselves lie elsewhere and cannot be mistaken for them.

A message names the thing and the numbers, in lower case, without a full stop.
`hint` is a second sentence that tells the reader what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class OnedBackupError(Exception):
    """Base of all errors that a user may see; `str()` is one line."""

    exit_code: ClassVar[int] = 1
    #: the daemon may try the same thing again
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.message = " ".join(message.split())
        self.hint = hint

    def to_json(self) -> dict[str, str | int]:
        """As the journal keeps it and the API tells it."""
        return {
            "code": type(self).__name__,
            "message": self.message,
            "hint": self.hint or "",
            "exit_code": self.exit_code,
        }


class DriverFailed(OnedBackupError):
    """A driver failed without saying more; also death by a signal."""


class InvalidInput(OnedBackupError):
    """What the user gave cannot be used: nothing was done."""

    exit_code = 2


class NothingToBackUp(InvalidInput):
    """A VM has no disk that could be backed up, which is no failure where all VMs are meant."""


class Cancelled(OnedBackupError):
    """The operation was ended on request."""

    exit_code = 3


class Conflict(OnedBackupError):
    """Somebody else changed the document meanwhile, or it is in use."""

    exit_code = 4


class DaemonUnreachable(OnedBackupError):
    """The command line found no daemon behind its socket."""

    exit_code = 5


class Unsupported(OnedBackupError):
    """No such action or feature; never retried."""

    exit_code = 64


class DataCorrupt(OnedBackupError):
    """Stored data fails verification; never retried, never flattened."""

    exit_code = 65


class NotFound(OnedBackupError):
    """Positively absent: somebody looked, and it is not there."""

    exit_code = 66


class Unavailable(OnedBackupError):
    """Host, store or service not reachable: whether the thing exists is unknown."""

    exit_code = 69
    retryable = True


class DriverBug(OnedBackupError):
    """A driver raised what it should have handled, or its output breaks the contract."""

    exit_code = 70


class NoSpace(OnedBackupError):
    """The target is full."""

    exit_code = 73


class Busy(OnedBackupError):
    """Locked by somebody, or changing under our hands; worth another try."""

    exit_code = 75
    retryable = True


class PermissionDenied(OnedBackupError):
    """The key, password or ownership at hand does not open it."""

    exit_code = 77


class Misconfigured(OnedBackupError):
    """A setting or datastore parameter is wrong: no retry helps before it is changed."""

    exit_code = 78


class Salvaged(OnedBackupError):
    """A restore finished, but ranges that could not be proved are zero-filled.

    `answer`: what the driver printed, with the key SALVAGED.
    """

    exit_code = 79
    answer: Mapping[str, str] = MappingProxyType({})


_BY_EXIT_CODE: dict[int, type[OnedBackupError]] = {
    error.exit_code: error
    for error in (
        Conflict,
        Unsupported,
        DataCorrupt,
        NotFound,
        Unavailable,
        DriverBug,
        NoSpace,
        Busy,
        PermissionDenied,
        Misconfigured,
        Salvaged,
    )
}


def error_for_exit_code(code: int) -> type[OnedBackupError]:
    """The class that a driver's exit code stands for; `DriverFailed` for all other codes."""
    return _BY_EXIT_CODE.get(code, DriverFailed)
