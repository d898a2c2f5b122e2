"""Each running operation's lock file: whoever holds its lock is a driver of that operation, or the daemon.

The daemon locks `run/op-<id>.lock` (flock) and its drivers inherit the open
descriptor. A restarted daemon that cannot get the lock knows, without trusting
any number, that a driver of its predecessor still lives, and finds it by that file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")
_POLL_S = 0.05


def lock_path(run_dir: Path, operation_id: str) -> Path:
    """The lock file of an operation."""
    return run_dir / f"{operation_id}.lock"


@contextlib.contextmanager
def held(run_dir: Path, operation_id: str) -> Iterator[int]:
    """The descriptor of the operation's lock, taken; the file is gone afterwards."""
    path = lock_path(run_dir, operation_id)
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def end_old_drivers(run_dir: Path, operation_id: str, *, grace_s: float) -> bool:
    """Whether no driver of the operation lives any more; TERM first, KILL after `grace_s`.

    A group is only signalled while one of its processes has the lock file open.
    """
    path = lock_path(run_dir, operation_id)
    if not path.exists():
        return True
    descriptor = _open(path)
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + grace_s
            told: set[int] = set()
            while not _try(descriptor):
                for group in _groups_with(path) - told:
                    told.add(group)
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(group, number)
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)
            else:
                return True
        return False
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _groups_with(path: Path) -> set[int]:
    """The process groups, other than ours, in which a process has `path` open."""
    groups = set()
    wanted = path.resolve()
    for process in _PROC.iterdir():
        if not process.name.isdecimal():
            continue
        try:
            if any(entry.readlink() == wanted for entry in (process / "fd").iterdir()):
                groups.add(os.getpgid(int(process.name)))
        except OSError:  # it has ended, or is not ours
            continue
    return groups - {os.getpgrp()}
