"""What the exit codes of rsync, and the words of the programs on the server, mean: one table each.

Unknown is not absent: whatever can come from a connection that broke is
`Unavailable`, so that the transfer is tried again.
"""

from __future__ import annotations

from collections.abc import Mapping

from oned_backup.errors import (
    DriverFailed,
    Misconfigured,
    NoSpace,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
    Unsupported,
)
from oned_backup.sdk.ssh import failed
from oned_backup.ssh.command import FAILED

#: rsync(1), "EXIT VALUES"; what is not here is DriverFailed
EXIT_CODES: Mapping[int, type[OnedBackupError]] = {
    1: Misconfigured,  # syntax or usage
    2: Misconfigured,  # protocol incompatibility
    4: Unsupported,  # action not supported by this version
    5: Unavailable,  # starting the protocol
    10: Unavailable,  # socket I/O: also a receiver that was killed
    12: Unavailable,  # the protocol's data stream: a connection that was cut
    30: Unavailable,  # time-out in send or receive
    35: Unavailable,  # time-out waiting for a connection
    127: Misconfigured,  # the remote shell found no rsync
}

#: after these the same transfer may go on by another connection
LOST_CONNECTION = frozenset({5, 10, 12, 30, 35, FAILED})

#: what the operating system says, wherever it is said; the first that fits counts
_WORDS: tuple[tuple[str, type[OnedBackupError]], ...] = (
    ("No space left on device", NoSpace),
    ("Disk quota exceeded", NoSpace),
    ("Read-only file system", PermissionDenied),
    ("Permission denied", PermissionDenied),
    ("Operation not permitted", PermissionDenied),
    ("Stale file handle", Unavailable),
    ("Input/output error", Unavailable),
    ("Transport endpoint is not connected", Unavailable),
    ("Connection timed out", Unavailable),
)
_WHAT_THE_SERVER_NEEDS = "The account on the server needs a shell, coreutils, rsync and sftp."


class NotTheLink(Unavailable):
    """Nothing that another connection to the server would help."""


def explain_rsync(target: str, code: int, stderr: str) -> OnedBackupError:
    """The error for an rsync to or from `target` that ended with `code`, not 0."""
    if code == FAILED:
        return failed(target, stderr.encode())
    if code < 0:
        return DriverFailed(f"rsync to {target}: killed by signal {-code}")
    text = f"rsync to {target}: {_telling(stderr)} (exit code {code})"
    if code == 127 or "command not found" in stderr or "rsync: not found" in stderr:
        return Misconfigured(f"rsync is not installed on {target}", hint=_WHAT_THE_SERVER_NEEDS)
    return (kind_of_words(stderr) or EXIT_CODES.get(code, DriverFailed))(text)


def explain_refusal(target: str, said: str) -> Misconfigured:
    """The error for a server that does not run what it is told to, such as one that is for rsync only."""
    return Misconfigured(
        f"{target} does not let us run a shell: {said or 'no message'}", hint=_WHAT_THE_SERVER_NEEDS
    )


def kind_of_words(text: str) -> type[OnedBackupError] | None:
    """The class for a message of the operating system, None if it is none that we know."""
    return next((kind for words, kind in _WORDS if words in text), None)


def _telling(stderr: str) -> str:
    """The line that says what happened: the last one of rsync's is only a summary."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    known = [line for line in lines if kind_of_words(line)]
    return (
        known or [line for line in lines if not line.startswith("rsync error:")] or lines or ["no message"]
    )[0]
