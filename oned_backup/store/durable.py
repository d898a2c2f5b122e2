"""Commits of several threads made durable by one fdatasync.

SQLite (WAL, synchronous=NORMAL) writes a commit to the end of its log without waiting for
the disk. Who has committed then waits here: one thread syncs the log, all commits that were
written before it began are durable with it, and those that came meanwhile share the next one.
That is what synchronous=FULL does, but the lock of the writers is not held meanwhile, so that
many operations at a time do not wait for each other's disk. The log is one file that is only
appended to: if a commit is durable, so are all before it. SQLite syncs the log itself before
it copies from it into the database, and syncs that before it begins the log anew (wal.html).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from oned_backup.errors import Unavailable


class CommitLog:
    """The log of the database at `path`, and how far it is durable."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}-wal")
        self._changed = threading.Condition()
        self._written = 0
        self._durable = 0
        self._syncing = False
        self._lost: OSError | None = None

    def committed(self) -> int:
        """The number of a commit that was just written; call it before another one can be."""
        with self._changed:
            self._written += 1
            return self._written

    def check(self) -> None:
        """`Unavailable` if a sync has failed: the kernel may have dropped what it could not write."""
        if self._lost is not None:
            raise Unavailable(
                f"{self._path} could not be synced: {self._lost.strerror}",
                hint="See to the disk, then start the daemon again.",
            )

    def wait(self, number: int) -> None:
        """Return when that commit, and with it all before it, is durable."""
        with self._changed:
            while self._durable < number:
                self.check()
                if self._syncing:
                    self._changed.wait()
                else:
                    self._sync()

    def _sync(self) -> None:
        """Sync what is written by now; the lock is held, but not while the disk works."""
        self._syncing, covered = True, self._written
        self._changed.release()
        durable, lost = self._durable, None
        try:
            sync_file(self._path)
            durable = covered
        except OSError as error:
            lost = error
        finally:
            self._changed.acquire()
            self._syncing, self._durable, self._lost = False, durable, lost
            self._changed.notify_all()


def sync_file(path: Path) -> None:
    """Wait until the file's data is on the disk.

    A log that is gone was copied into the database, and synced, when its last connection was closed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
