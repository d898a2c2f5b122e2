"""A commit is on the disk when `write` returns, whoever has synced it."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from oned_backup.errors import Unavailable
from oned_backup.store import Store, durable
from oned_backup.store.durable import CommitLog


class Disk:
    """Stands in for the disk: a sync takes until it is let go, and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.error: OSError | None = None
        monkeypatch.setattr(durable, "sync_file", self.sync)

    def sync(self, _path: Path) -> None:
        self.begun.release()
        assert self.go.acquire(timeout=10)
        if self.error is not None:
            raise self.error


def test_the_log_is_synced_before_a_write_returns(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []

    def fdatasync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    log = path.with_name(f"{path.name}-wal")
    for number in range(3):
        store.journal.enqueue("k", f"l{number}", {})
        assert synced[-1] == (log.stat().st_ino, log.stat().st_size)
    with pytest.raises(ZeroDivisionError), store.transaction() as tx:
        tx.journal.enqueue("k", "l", {"n": 1 // 0})
    assert len(synced) == 3


def test_commits_that_come_during_a_sync_share_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    log = CommitLog(Path("/nowhere"))
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(log.wait, log.committed())
        assert disk.begun.acquire(timeout=10)
        later = [pool.submit(log.wait, log.committed()) for _ in range(3)]
        disk.go.release()
        first.result(10)
        assert disk.begun.acquire(timeout=10)
        assert not any(one.done() for one in later), "the sync had begun before they were written"
        disk.go.release()
        for one in later:
            one.result(10)
    assert not disk.begun.acquire(blocking=False), "one sync for all three"


def test_a_sync_that_failed_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.error = OSError(5, "Input/output error")
    log = CommitLog(Path("/nowhere"))
    disk.go.release()
    with pytest.raises(Unavailable, match="could not be synced: Input/output error"):
        log.wait(log.committed())
    disk.error = None
    for ask in (log.check, lambda: log.wait(log.committed())):
        with pytest.raises(Unavailable, match="could not be synced"):
            ask()
    assert disk.begun.acquire(blocking=False)
    assert not disk.begun.acquire(blocking=False), "it is not tried again"


def test_nothing_is_written_after_a_sync_that_failed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fdatasync(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    with pytest.raises(Unavailable):
        store.journal.enqueue("k", "l", {})
    monkeypatch.undo()
    before = store.journal.list()
    with pytest.raises(Unavailable, match="could not be synced") as caught:
        store.journal.enqueue("k", "l", {})
    assert "start the daemon again" in (caught.value.hint or "")
    assert store.journal.list() == before
