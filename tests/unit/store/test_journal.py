import itertools
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from sqlalchemy import event

from oned_backup.errors import Conflict, InvalidInput, NotFound
from oned_backup.store import Journal, OperationState, StepState, Store
from oned_backup.store.store import _Joined

FINAL = [OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED]


def enqueue(store, lock="vm:1", **arguments):
    return store.journal.enqueue("backup", lock, arguments)


def test_an_operation_and_its_steps_are_told_as_they_were(path):
    ticks = itertools.count(100)
    with Store.open(path, now=lambda: float(next(ticks))) as store:
        journal = store.journal
        queued = journal.enqueue("backup", "vm:7", {"b": [1, "ü"], "a": None}, vm_id=7, datastore_id=100)
        running = journal.claim()
        first = journal.begin_step(queued.id, "prepare", {"backup_id": "x"})
        journal.end_step(queued.id, first, StepState.DONE, {"disks": 2})
        second = journal.begin_step(queued.id, "store")
        journal.end_step(queued.id, second, StepState.FAILED)
        journal.end_step(queued.id, first, StepState.UNDONE)
        journal.finish(queued.id, OperationState.FAILED, result={"bytes": 5}, error="no space")

    with Store.open(path) as store:
        ended = store.journal.get(queued.id)
        steps = store.journal.steps(queued.id)
    assert queued.id.startswith("op-")
    assert len(queued.id) == 15
    assert (queued.state, running.state, ended.state) == ("QUEUED", "RUNNING", "FAILED")
    assert ended.arguments == {"a": None, "b": [1, "ü"]}
    assert (ended.vm_id, ended.image_id, ended.datastore_id) == (7, None, 100)
    assert (ended.result, ended.error) == ({"bytes": 5}, "no space")
    assert (ended.queued_at, ended.started_at, ended.ended_at) == (100.0, 101.0, 107.0)
    assert [(s.number, s.name, s.state, s.data, s.result) for s in steps] == [
        (1, "prepare", "UNDONE", {"backup_id": "x"}, {"disks": 2}),
        (2, "store", "FAILED", {}, {}),
    ]


def test_the_oldest_that_may_run_is_claimed(store):
    first, blocked, other = (enqueue(store, lock) for lock in ("vm:1", "vm:1", "vm:2"))

    assert [store.journal.claim().id, store.journal.claim().id] == [first.id, other.id]
    assert store.journal.claim() is None
    store.journal.finish(first.id, OperationState.DONE)
    assert store.journal.claim().id == blocked.id
    assert [op.id for op in store.journal.unfinished()] == [blocked.id, other.id]


def test_what_must_wait_keeps_its_place_within_its_lock(store):
    enqueue(store, "vm:1", host=1)
    enqueue(store, "vm:1", host=2)
    free = enqueue(store, "vm:2", host=2)

    assert store.journal.claim(lambda op: op.arguments["host"] == 2).id == free.id
    assert store.journal.claim(lambda op: op.arguments["host"] == 2) is None


def test_a_queued_operation_is_cancelled_at_once_and_a_running_one_is_asked(store):
    running, queued = enqueue(store), enqueue(store)
    store.journal.claim()

    assert store.journal.request_cancel(queued.id).state is OperationState.CANCELLED
    asked = store.journal.request_cancel(running.id)
    assert (asked.state, asked.cancel_requested) == (OperationState.RUNNING, True)
    store.journal.finish(running.id, OperationState.CANCELLED)
    with pytest.raises(Conflict, match="has ended already: CANCELLED"):
        store.journal.request_cancel(running.id)
    with pytest.raises(NotFound, match="no operation op-x"):
        store.journal.request_cancel("op-x")


def test_what_has_ended_stays_as_it_is(store):
    operation = enqueue(store)
    with pytest.raises(Conflict, match="is QUEUED, not RUNNING"):
        store.journal.begin_step(operation.id, "x")
    with pytest.raises(Conflict, match="is QUEUED, not RUNNING"):
        store.journal.finish(operation.id, OperationState.DONE)
    store.journal.claim()
    number = store.journal.begin_step(operation.id, "x")
    with pytest.raises(NotFound, match="has no step 2"):
        store.journal.end_step(operation.id, 2, StepState.DONE)
    with pytest.raises(InvalidInput, match="RUNNING does not end"):
        store.journal.finish(operation.id, OperationState.RUNNING)
    store.journal.finish(operation.id, OperationState.DONE)

    for late in (
        lambda: store.journal.begin_step(operation.id, "y"),
        lambda: store.journal.end_step(operation.id, number, StepState.DONE),
        lambda: store.journal.finish(operation.id, OperationState.FAILED),
    ):
        with pytest.raises(Conflict, match="is DONE, not RUNNING"):
            late()


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), Path("/x")])
def test_only_plain_data_is_journaled(store, value):
    with pytest.raises(InvalidInput, match="not plain data"):
        enqueue(store, value=value)


def test_names_that_are_no_unicode_are_journaled(store):
    operation = enqueue(store, path="/srv/\udcff.img")
    store.journal.claim()
    store.journal.finish(operation.id, OperationState.FAILED, error="/srv/\udcff.img: gone")

    assert store.journal.get(operation.id).arguments == {"path": "/srv/\udcff.img"}
    assert store.journal.get(operation.id).error == "/srv/?.img: gone"


def test_lists_are_newest_first_and_old_ones_are_forgotten(path):
    ticks = itertools.count(1)
    with Store.open(path, now=lambda: float(next(ticks))) as store:
        ids = [enqueue(store, f"vm:{n}").id for n in range(4)]
        for _ in range(3):
            store.journal.claim()
        store.journal.begin_step(ids[0], "x")
        store.journal.finish(ids[0], OperationState.DONE)
        store.journal.finish(ids[1], OperationState.FAILED)

        assert [op.id for op in store.journal.list()] == ids[::-1]
        assert [op.id for op in store.journal.list(limit=1)] == ids[3:]
        assert [op.id for op in store.journal.list(state=OperationState.DONE)] == ids[:1]
        assert store.journal.list(vm_id=5) == []
        ended = store.journal.get(ids[1]).ended_at
        assert store.journal.prune(ended) == 1
        assert store.journal.prune(ended + 1) == 1
        assert store.journal.prune(1e9) == 0
        assert [op.state for op in store.journal.list()] == ["QUEUED", "RUNNING"]
        assert store.journal.steps(ids[0]) == []


def test_what_ran_at_a_time_or_later(path):
    ticks = itertools.count(1)
    with Store.open(path, now=lambda: float(next(ticks))) as store:
        before, across, after, _queued = (enqueue(store, f"vm:{n}").id for n in range(4))
        other_kind = store.journal.enqueue("verify", "vm:9", {}).id
        for _ in range(2):
            store.journal.claim(kinds=frozenset({"backup"}))
        store.journal.claim(kinds=frozenset({"verify"}))
        ended = store.journal.finish(before, OperationState.DONE).ended_at
        store.journal.finish(across, OperationState.DONE)
        store.journal.claim()
        found = {operation.id for operation in store.journal.overlapping(ended + 0.5, {"backup"})}
        assert found == {across, after}
        kinds = {"backup", "verify"}
        found = {operation.id for operation in store.journal.overlapping(ended, kinds)}
        assert found == {before, across, after, other_kind}


def test_threads_never_run_one_lock_twice(store):
    for number in range(60):
        enqueue(store, f"vm:{number % 5}", number=number)
    guard = threading.Lock()
    busy: set[str] = set()
    doubles: list[str] = []
    order: dict[str, list[int]] = {}

    def work():
        while store.journal.list(state=OperationState.QUEUED, limit=1):
            operation = store.journal.claim()
            if operation is None:
                continue
            with guard:
                if operation.lock in busy:
                    doubles.append(operation.id)
                busy.add(operation.lock)
                order.setdefault(operation.lock, []).append(operation.arguments["number"])
            number = store.journal.begin_step(operation.id, "work")
            store.journal.end_step(operation.id, number, StepState.DONE)
            with guard:
                busy.discard(operation.lock)
            store.journal.finish(operation.id, OperationState.DONE)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert doubles == []
    assert sum(map(len, order.values())) == 60
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert {op.state for op in store.journal.list()} == {OperationState.DONE}


class JournalMachine(RuleBasedStateMachine):
    """The journal against a model of it in a few dicts, reopened at any time."""

    operations = Bundle("operations")

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "db"
        self.store = Store.open(self.path)
        self.states: dict[str, OperationState] = {}
        self.locks: dict[str, str] = {}
        self.steps: dict[str, list[StepState]] = {}

    def teardown(self):
        self.store.close()
        self.folder.cleanup()

    def _allowed(self, call, allowed):
        if allowed:
            return call()
        with pytest.raises(Conflict):
            call()
        return None

    def _runs(self, op):
        return self.states[op] is OperationState.RUNNING

    @rule(target=operations, lock=st.sampled_from("abc"))
    def enqueue(self, lock):
        op = self.store.journal.enqueue("k", lock, {}).id
        self.states[op], self.locks[op], self.steps[op] = OperationState.QUEUED, lock, []
        return op

    @rule()
    def claim(self):
        busy = {self.locks[op] for op in self.states if self._runs(op)}
        queued = [op for op, state in self.states.items() if state is OperationState.QUEUED]
        expected = next((op for op in queued if self.locks[op] not in busy), None)
        claimed = self.store.journal.claim()
        assert (None if claimed is None else claimed.id) == expected
        if expected:
            self.states[expected] = OperationState.RUNNING

    @rule(op=operations)
    def begin(self, op):
        number = self._allowed(lambda: self.store.journal.begin_step(op, "s"), self._runs(op))
        if number is not None:
            self.steps[op].append(StepState.INTENT)
            assert number == len(self.steps[op])

    @rule(op=operations, state=st.sampled_from(StepState), data=st.data())
    def end(self, op, state, data):
        if not self.steps[op]:
            return
        number = data.draw(st.integers(1, len(self.steps[op])))
        old = self.steps[op][number - 1]
        sound = (old is StepState.INTENT and state is not StepState.INTENT) or (
            old in {StepState.DONE, StepState.FAILED} and state is StepState.UNDONE
        )
        allowed = self._runs(op) and sound
        self._allowed(lambda: self.store.journal.end_step(op, number, state), allowed)
        if allowed:
            self.steps[op][number - 1] = state

    @rule(op=operations, state=st.sampled_from(FINAL))
    def finish(self, op, state):
        allowed = self._runs(op)
        self._allowed(lambda: self.store.journal.finish(op, state), allowed)
        if allowed:
            self.states[op] = state

    @rule(op=operations)
    def cancel(self, op):
        state = self.states[op]
        self._allowed(lambda: self.store.journal.request_cancel(op), state not in FINAL)
        if state is OperationState.QUEUED:
            self.states[op] = OperationState.CANCELLED

    @rule()
    def reopen(self):
        self.store.close()
        self.store = Store.open(self.path)

    @invariant()
    def agrees(self):
        stored = self.store.journal.list()[::-1]
        assert {op.id: op.state for op in stored} == self.states
        running = [op for op in self.states if self._runs(op)]
        assert [op.id for op in self.store.journal.unfinished()] == running
        assert len({self.locks[op] for op in running}) == len(running)
        for op, states in self.steps.items():
            assert [step.state for step in self.store.journal.steps(op)] == states


TestJournalMachine = JournalMachine.TestCase
TestJournalMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


def test_a_postponed_operation_waits_its_time_and_holds_nothing(store: Store) -> None:
    first = store.journal.enqueue("backup", "vm:1", {})
    second = store.journal.enqueue("restore", "vm:1", {})
    claimed = store.journal.claim()
    assert claimed is not None
    assert claimed.id == first.id
    waiting = store.journal.postpone(first.id, 3600, result={"attempts": 1}, error="{}")
    assert waiting.state is OperationState.QUEUED
    assert waiting.not_before is not None
    other = store.journal.claim()
    assert other is not None
    assert other.id == second.id
    store.journal.finish(second.id, OperationState.DONE)
    assert store.journal.claim() is None
    assert store.journal.request_cancel(first.id).state is OperationState.CANCELLED


def test_a_postponed_operation_goes_on_as_it_was(store: Store) -> None:
    operation = store.journal.enqueue("backup", "vm:1", {})
    first = store.journal.claim()
    assert first is not None
    store.journal.postpone(operation.id, 0, result={"attempts": 1}, error="{}")
    again = store.journal.claim()
    assert again is not None
    assert (again.id, again.started_at, again.not_before) == (operation.id, first.started_at, None)
    assert again.result == {"attempts": 1}


def test_one_whose_end_was_asked_for_is_not_postponed(store: Store) -> None:
    operation = store.journal.enqueue("backup", "vm:1", {})
    store.journal.claim()
    store.journal.request_cancel(operation.id)
    ended = store.journal.postpone(operation.id, 3600, result={}, error="{}")
    assert (ended.state, ended.not_before) == (OperationState.CANCELLED, None)
    assert ended.ended_at is not None


@pytest.mark.fault("odd inputs", "clock that goes backwards")
def test_a_clock_that_was_ahead_holds_no_operation_back(store: Store) -> None:
    operation = store.journal.enqueue("backup", "vm:1", {})
    store.journal.claim()
    store.journal.postpone(operation.id, 300 * 86_400, result={}, error="{}")
    claimed = store.journal.claim()
    assert claimed is not None
    assert claimed.id == operation.id


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ({"vm_id": 7, "kind": "backup"}, "operations_by_vm"),
        ({"datastore_id": 100, "kind": "prune"}, "operations_by_datastore"),
        ({"state": OperationState.FAILED, "kind": "backup"}, "operations_by_state"),
    ],
)
def test_lists_find_their_operations_by_an_index(store: Store, wanted: dict, index: str) -> None:
    statements = []
    with store._database.read() as connection:
        event.listen(connection, "before_cursor_execute", lambda *told: statements.append(told[2:4]))
        Journal(_Joined(connection, store._database.now)).list(**wanted)
        (asked,) = statements
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked[0]}", asked[1]).all()
    assert [index in row.detail for row in plan] == [True], plan
