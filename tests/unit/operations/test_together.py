"""Driver calls side by side: one progress, one cancellation, one failure."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from oned_backup.errors import Cancelled, NoSpace
from oned_backup.operations.caller import Caller
from oned_backup.operations.context import Context
from oned_backup.operations.together import call_together
from oned_backup.runner.run import Cancellation

from .conftest import World


@pytest.fixture
def context(world: World) -> Context:
    world.services.store.journal.enqueue("restore", "vm:0", {})
    operation = world.services.store.journal.claim()
    assert operation is not None
    return Context(world.services, operation)


def test_progress_is_the_sum_of_all(context: Context) -> None:
    told: list[tuple[int, int]] = []
    context.report = lambda _step, done, total: told.append((done, total))

    def read(key: int, caller: Caller) -> int:
        assert caller.progress is not None
        caller.progress(key, 10 * key)
        return key + 1

    calls = {key: partial(read, key) for key in (1, 2, 3)}
    found = call_together(context, calls, at_a_time=1, expected_bytes={1: 100, 2: 100, 3: 100})
    assert found == {1: 2, 2: 3, 3: 4}
    assert told == [(1, 210), (3, 130), (6, 60)]


def test_no_more_than_so_many_at_a_time(context: Context) -> None:
    both, lock = threading.Barrier(2, timeout=20), threading.Lock()
    running: list[int] = []
    most = 0

    def read(key: int, _caller: Caller) -> None:
        nonlocal most
        with lock:
            running.append(key)
            most = max(most, len(running))
        both.wait()
        with lock:
            running.remove(key)

    calls = {key: partial(read, key) for key in range(6)}
    call_together(context, calls, at_a_time=2, expected_bytes={})
    assert most == 2


def test_the_first_failure_ends_all_others(context: Context) -> None:
    ended: list[int] = []

    def wait(key: int, caller: Caller) -> None:
        assert caller.cancellation.wait(20)
        ended.append(key)
        raise Cancelled("ended by the others")

    def fail(caller: Caller) -> None:
        raise NoSpace(f"full: {caller.operation_id}")

    with pytest.raises(NoSpace, match="full"):
        call_together(
            context, {1: partial(wait, 1), 2: partial(wait, 2), 3: fail}, at_a_time=3, expected_bytes={}
        )
    assert sorted(ended) == [1, 2]
    assert not context.cancellation.cancelled


def test_whoever_cancels_the_operation_ends_all(context: Context) -> None:
    context.cancellation = Cancellation()
    begun = threading.Barrier(3, timeout=20)

    def wait(_key: int, caller: Caller) -> None:
        begun.wait()
        assert caller.cancellation.wait(20)
        raise Cancelled("ended")

    def cancel() -> None:
        begun.wait()
        context.cancellation.cancel()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(Cancelled):
        call_together(context, {1: partial(wait, 1), 2: partial(wait, 2)}, at_a_time=2, expected_bytes={})
    canceller.join()
