"""A watchman for scratch space: when it runs out, the backup ends, not the guest.

QEMU stops a guest whose overwritten data it cannot save to the scratch file
(QEMU 7.2: the write fails, and the domain is paused). So while a job runs, a small
process looks at the free space where the scratch files lie. Below the limit,
or should the guest be paused by an I/O error all the same, it aborts the job and
lets the guest go on. The reader of the export then fails.

On another machine it also tells the `deadman` that somebody is there, for as long as the daemon lives.

It is found and ended like qemu-nbd: by a locked pid file in the operation's
socket directory. It ends by itself when the job does; a libvirtd that is being
restarted is waited for, because the job lives in QEMU and goes on.
"""

from __future__ import annotations

import fcntl
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from oned_backup.errors import NoSpace, OnedBackupError, Unavailable
from oned_backup.hypervisor import backup_job, freeze
from oned_backup.hypervisor.connection import connected
from oned_backup.hypervisor.domain import Domain, find_domain
from oned_backup.hypervisor.host import Host, LocalHost, host_for
from oned_backup.transfer.task import Task

#: what a fast guest overwrites between two looks, and some more
MIN_FREE_BYTES = 256 << 20

_INTERVAL_S = 0.25
_REMOTE_INTERVAL_S = 1.0
#: a restart of libvirtd takes seconds, an upgrade a little longer
_WAIT_FOR_LIBVIRT_S = 600.0
#: how often another machine is told that we are there
_ALIVE_S = 10.0
_PID_FILE = "guard.pid"
_NOTE = "aborted"
#: see `deadman`
ALIVE = "alive"


def require_scratch(host: Host, folders: Iterable[Path]) -> None:
    """Raise `NoSpace` unless there is room to begin a job with scratch files in these folders."""
    shortage = _shortage(host, folders)
    if shortage:
        raise NoSpace(shortage, hint="Free some space, or set the scratch directory to another file system.")


def start(task: Task, domain: Domain, folders: Iterable[Path]) -> None:
    """Start the watchman of a job that has begun."""
    _start(task.uri, domain.uuid, task.operation_dir, task.local_dir, *folders)


def start_for_servers(uri: str, operation_dir: Path, local_dir: Path) -> None:
    """Start the watchman of servers on another machine: it tells their deadman that we are there."""
    _start(uri, "", operation_dir, local_dir)


def _start(uri: str, uuid: str, *places: Path) -> None:
    owner = os.pidfd_open(os.getppid())
    try:
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(owner), uri, uuid, *map(str, places)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
            pass_fds=[owner],
        )
    finally:
        os.close(owner)


def reason_of_abort(task: Task) -> str:
    """Why the watchman has aborted the operation's job; empty if it has not."""
    try:
        return (task.local_dir / _NOTE).read_text()
    except FileNotFoundError:
        return ""


def stop(local_dir: Path) -> None:
    """End the watchman of an operation on another machine."""
    LocalHost().stop_process(local_dir / _PID_FILE)


def watch(owner: int, uri: str, uuid: str, operation_dir: Path, local_dir: Path, *folders: Path) -> None:
    """Look until the operation's job has ended; end it if need be. `owner`: a pidfd of the daemon."""
    host = host_for(uri, local_dir)
    if not folders:
        while local_dir.is_dir() and not _has_ended(owner):
            _tell_alive(host, operation_dir)
            _has_ended(owner, wait_s=_ALIVE_S)
        return
    interval_s = _REMOTE_INTERVAL_S if host.machine else _INTERVAL_S
    told_at = -math.inf
    with connected(uri) as connection:
        domain = find_domain(connection, uuid, "")
        while domain.is_active and backup_job.is_beneath(backup_job.current_socket(domain), operation_dir):
            if host.machine and time.monotonic() > told_at + _ALIVE_S and not _has_ended(owner):
                told_at = time.monotonic()
                _tell_alive(host, operation_dir)
            reason = _shortage(host, folders)
            if not reason and freeze.is_paused_by_io_error(domain):
                reason = "the guest was stopped by an I/O error while its backup ran"
            if reason:
                (local_dir / _NOTE).write_text(reason)
                backup_job.abort(domain, operation_dir)
                freeze.resume_after_io_error(domain)
                return
            time.sleep(interval_s)


def _tell_alive(host: Host, operation_dir: Path) -> None:
    host.run(["touch", "-c", "--", str(operation_dir / ALIVE)])


def _has_ended(owner: int, wait_s: float = 0) -> bool:
    """Whether the process of this pidfd ends within that time."""
    return bool(select.select([owner], [], [], wait_s)[0])


def _shortage(host: Host, folders: Iterable[Path]) -> str:
    """What to say of the first folder with too little room; empty if there is none."""
    for folder in folders:
        free = host.free_bytes(folder)
        if free < MIN_FREE_BYTES:
            return f"scratch in {folder}: {MIN_FREE_BYTES >> 20} MB needed, {free >> 20} MB free"
    return ""


def _main(owner: str, uri: str, uuid: str, operation: str, local: str, *folders: str) -> None:
    operation_dir, local_dir = Path(operation), Path(local)
    descriptor = os.open(local_dir / _PID_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    give_up_at = time.monotonic() + _WAIT_FOR_LIBVIRT_S
    while True:
        began = time.monotonic()
        try:
            watch(int(owner), uri, uuid, operation_dir, local_dir, *map(Path, folders))
        except Unavailable:
            now = time.monotonic()
            if now > began + 4 * _INTERVAL_S:  # it had been there, so this is another restart
                give_up_at = now + _WAIT_FOR_LIBVIRT_S
            if now > give_up_at or not local_dir.is_dir():
                raise
            time.sleep(_INTERVAL_S)
        else:
            return


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except (OnedBackupError, OSError):
        sys.exit(1)  # the domain, libvirt or the directory is gone: nothing left to guard
