"""A watchman for scratch space: when it runs out, the backup ends, not the guest.

QEMU stops a guest whose overwritten data it cannot save to the scratch file
(QEMU 7.2: the write fails, and the domain is paused). So while a job runs, a small
process looks at the free space where the scratch files lie. Below the limit,
or should the guest be paused by an I/O error all the same, it aborts the job and
lets the guest go on. The reader of the export then fails.

Should the daemon die, and none come back for two minutes to end what it had begun, the watchman does
that: it ends the job, or the servers of a domain that is off, which could not be started. On another
machine a `deadman` does so, to whom the watchman tells that somebody is there as long as the daemon lives.

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

from oned_backup.errors import Busy, DriverFailed, NoSpace, OnedBackupError, Unavailable
from oned_backup.hypervisor import backup_job, freeze, offline
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
#: a daemon that comes back has cleaned up by then, and a link that is lost for so long has ended the backup
LOST_S = 120


class Daemon:
    """The process that has begun the operation, known by a pidfd."""

    def __init__(self, pidfd: int, *, lost_s: float = LOST_S) -> None:
        self._pidfd = pidfd
        self._lost_s = lost_s
        self._ended_at: float | None = None

    def has_ended(self, wait_s: float = 0) -> bool:
        """Whether it ends within that time."""
        return bool(select.select([self._pidfd], [], [], wait_s)[0])

    def is_lost(self) -> bool:
        """Whether it has ended so long ago that no other one will take up what it had begun."""
        if self._ended_at is None and self.has_ended():
            self._ended_at = time.monotonic()
        return self._ended_at is not None and time.monotonic() > self._ended_at + self._lost_s


def require_scratch(host: Host, folders: Iterable[Path]) -> None:
    """Raise `NoSpace` unless there is room to begin a job with scratch files in these folders."""
    shortage = _shortage(host, folders)
    if shortage:
        raise NoSpace(shortage, hint="Free some space, or set the scratch directory to another file system.")


def start(task: Task, domain: Domain, folders: Iterable[Path]) -> None:
    """Start the watchman of a job that has begun."""
    _start(task.uri, domain.uuid, task.operation_dir, task.local_dir, *folders)


def start_for_servers(uri: str, operation_dir: Path, local_dir: Path) -> None:
    """Start the watchman of servers, which has nothing to do but to tell whether the daemon is there."""
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


def watch(daemon: Daemon, uri: str, uuid: str, operation_dir: Path, local_dir: Path, *folders: Path) -> None:
    """Look until the operation's job has ended; end it if need be. Without `uuid`: the same for servers."""
    host = host_for(uri, local_dir)
    if not uuid:
        _watch_servers(host, daemon, operation_dir, local_dir)
        return
    interval_s = _REMOTE_INTERVAL_S if host.machine else _INTERVAL_S
    told_at = -math.inf
    with connected(uri) as connection:
        domain = find_domain(connection, uuid, "")
        while domain.is_active and backup_job.is_beneath(backup_job.current_socket(domain), operation_dir):
            if host.machine and time.monotonic() > told_at + _ALIVE_S and not daemon.has_ended():
                told_at = time.monotonic()
                _tell_alive(host, operation_dir)
            is_lost = not host.machine and daemon.is_lost()
            reason = "the daemon has gone" if is_lost else _shortage(host, folders)
            if not reason and freeze.is_paused_by_io_error(domain):
                reason = "the guest was stopped by an I/O error while its backup ran"
            if reason:
                (local_dir / _NOTE).write_text(reason)
                backup_job.abort(domain, operation_dir)
                freeze.resume_after_io_error(domain)
                if is_lost:
                    host.remove(operation_dir)
                return
            time.sleep(interval_s)


def _watch_servers(host: Host, daemon: Daemon, operation_dir: Path, local_dir: Path) -> None:
    if host.machine:
        while local_dir.is_dir() and not daemon.has_ended():
            _tell_alive(host, operation_dir)
            daemon.has_ended(wait_s=_ALIVE_S)
        return
    while local_dir.is_dir():
        if daemon.is_lost():
            offline.stop_servers(host, operation_dir)
            host.remove(operation_dir)
        time.sleep(_REMOTE_INTERVAL_S)


def _tell_alive(host: Host, operation_dir: Path) -> None:
    host.run(["touch", "-c", "--", str(operation_dir / ALIVE)])


def _shortage(host: Host, folders: Iterable[Path]) -> str:
    """What to say of the first folder with too little room; empty if there is none."""
    for folder in folders:
        try:
            free = host.free_bytes(folder)
        except (OSError, DriverFailed) as error:
            return f"scratch in {folder}: its file system does not answer: {error}"
        if free < MIN_FREE_BYTES:
            return f"scratch in {folder}: {MIN_FREE_BYTES >> 20} MB needed, {free >> 20} MB free"
    return ""


def _main(owner: str, uri: str, uuid: str, operation: str, local: str, *folders: str) -> None:
    operation_dir, local_dir = Path(operation), Path(local)
    descriptor = os.open(local_dir / _PID_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.lockf(descriptor, fcntl.LOCK_EX)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    daemon = Daemon(int(owner))
    give_up_at = time.monotonic() + _WAIT_FOR_LIBVIRT_S
    while True:
        began = time.monotonic()
        try:
            watch(daemon, uri, uuid, operation_dir, local_dir, *map(Path, folders))
        except (Unavailable, Busy):  # libvirt is being restarted, or waits for QEMU on behalf of others
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
