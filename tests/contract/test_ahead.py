"""Drivers that are started before their request is known."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Request
from oned_backup.errors import Cancelled, Unavailable
from oned_backup.runner.ahead import start_ahead
from oned_backup.runner.drivers import Driver, load_driver
from oned_backup.runner.run import Cancellation, Invocation, Limits, run_action

DRIVERS = Path(__file__).resolve().parents[2] / "drivers"
LIMITS = Limits(deadline_s=30)


@pytest.fixture
def fs() -> Driver:
    return load_driver(DRIVERS / "datastore" / "fs")


def request(base: Path, *, images: bool = False) -> Request:
    datastore = xmldoc.build(
        "DATASTORE",
        {"ID": 100, "BASE_PATH": str(base), "IMAGES": {"ID": 0} if images else None},
    )
    return Request(Kind.DATASTORE, "op-1", "query", datastore=datastore)


def test_it_answers_like_one_that_was_started_late(fs: Driver, tmp_path: Path) -> None:
    ahead = start_ahead(fs, "monitor", work_root=tmp_path, operation_id="op-1")
    assert ahead is not None
    late = run_action(fs, "monitor", request(tmp_path), Invocation(tmp_path), limits=LIMITS)
    early = run_action(fs, "monitor", request(tmp_path), Invocation(tmp_path), limits=LIMITS, ahead=ahead)
    assert early.keys() == late.keys()
    assert early["TOTAL_MB"] == late["TOTAL_MB"]
    assert list(tmp_path.iterdir()) == []


def test_its_errors_arrive_too(fs: Driver, tmp_path: Path) -> None:
    store = tmp_path / "not mounted"
    store.mkdir()
    ahead = start_ahead(fs, "monitor", work_root=tmp_path, operation_id="op-1")
    with pytest.raises(Unavailable, match="Is it mounted"):
        run_action(
            fs, "monitor", request(store, images=True), Invocation(tmp_path), limits=LIMITS, ahead=ahead
        )


def test_without_a_request_it_ends_silently(fs: Driver, tmp_path: Path) -> None:
    ahead = start_ahead(fs, "backup", work_root=tmp_path, operation_id="op-1")
    assert ahead is not None
    out, err = ahead.process.communicate(timeout=30)  # closes its input, as a daemon that dies does
    assert (ahead.process.returncode, out, err) == (0, b"", b"")


def test_discarded_it_leaves_nothing_and_lets_the_lock_go(fs: Driver, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    ahead = start_ahead(fs, "backup", work_root=tmp_path, operation_id="op-1", lock_fd=descriptor)
    assert ahead is not None
    os.close(descriptor)
    again = os.open(lock, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    ahead.discard()
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_one_for_another_action_is_discarded(fs: Driver, tmp_path: Path) -> None:
    ahead = start_ahead(fs, "backup", work_root=tmp_path, operation_id="op-1")
    assert ahead is not None
    answer = run_action(fs, "monitor", request(tmp_path), Invocation(tmp_path), limits=LIMITS, ahead=ahead)
    assert answer["FREE_MB"]
    assert ahead.process.returncode is not None


def test_one_that_died_meanwhile_is_replaced(fs: Driver, tmp_path: Path) -> None:
    ahead = start_ahead(fs, "monitor", work_root=tmp_path, operation_id="op-1")
    assert ahead is not None
    ahead.process.kill()
    ahead.process.wait(30)
    answer = run_action(fs, "monitor", request(tmp_path), Invocation(tmp_path), limits=LIMITS, ahead=ahead)
    assert answer["FREE_MB"]


def test_cancelled_before_it_is_used(fs: Driver, tmp_path: Path) -> None:
    ahead = start_ahead(fs, "monitor", work_root=tmp_path, operation_id="op-1")
    assert ahead is not None
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        run_action(
            fs,
            "monitor",
            request(tmp_path),
            Invocation(tmp_path),
            limits=LIMITS,
            cancellation=cancellation,
            ahead=ahead,
        )
    assert ahead.process.returncode is not None


def test_drivers_that_do_not_promise_it_are_not_started(tmp_path: Path) -> None:
    kvm = load_driver(DRIVERS / "vmm" / "kvm")
    assert start_ahead(kvm, "monitor", work_root=tmp_path, operation_id="op-1") is None
    assert list(tmp_path.iterdir()) == []
