"""The operation journal: what was asked, what is being done, what became of it.

    QUEUED ---claim---> RUNNING ---finish---> DONE | FAILED | CANCELLED
    QUEUED ---request_cancel---> CANCELLED
    QUEUED <--postpone-- RUNNING      to be tried again, not before a given time

    INTENT ---end_step---> DONE | FAILED | UNDONE       DONE | FAILED ---end_step---> UNDONE

The intent of a step is committed before its effect, its outcome before the next
intent. So after a crash, every effect that may exist has an intent, and
`unfinished` tells which operations are to be brought to an end. At most one
operation of a lock runs; the oldest that may run is claimed first.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import sqlalchemy as sa

from oned_backup.errors import Conflict, InvalidInput, NotFound
from oned_backup.store.database import Session
from oned_backup.store.journal_entries import (
    STEP_CHANGES,
    Operation,
    OperationState,
    Step,
    StepState,
    dump,
    operation_of,
    plain_text,
    step_of,
)
from oned_backup.store.schema import operations, steps

_PRUNED_AT_ONCE = 1000
#: nobody waits longer: the clock was ahead when a time so far off was written
_LONGEST_WAIT_S = 86_400.0


# Built once: making a statement takes longer than running it.
_THIS = operations.c.id == sa.bindparam("this")
_GET = sa.select(operations).where(_THIS)
_CHANGE = operations.update().where(_THIS).returning(operations)
_NEW = operations.insert().returning(operations)
_THIS_NUMBER = steps.c.number == sa.bindparam("step")
_LAST_STEP = sa.select(sa.func.max(steps.c.number)).where(steps.c.operation_id == sa.bindparam("this"))
_STATE: sa.Select[Any] = (
    sa.select(
        operations.c.state,
        _LAST_STEP.scalar_subquery().label("last_step"),
        steps.c.state.label("step_state"),
        steps.c.name,
    )
    .outerjoin_from(operations, steps, (steps.c.operation_id == operations.c.id) & _THIS_NUMBER)
    .where(_THIS)
)
_CHANGE_STEP = steps.update().where(steps.c.operation_id == sa.bindparam("this"), _THIS_NUMBER)
_STEPS = sa.select(steps).where(steps.c.operation_id == sa.bindparam("this")).order_by(steps.c.number)
_NEW_STEP = steps.insert()
_CLAIM = (
    operations.update()
    .where(_THIS)
    .values(
        state=OperationState.RUNNING,
        started_at=sa.func.coalesce(operations.c.started_at, sa.bindparam("now")),
        not_before=None,
    )
    .returning(operations)
)


@cache
def _due(kinds: frozenset[str] | None) -> sa.Select[Any]:
    """The QUEUED operations of these kinds that may be claimed `now`, oldest first."""
    running = operations.alias("running")
    blocked = sa.exists().where(
        running.c.lock == operations.c.lock, running.c.state == OperationState.RUNNING
    )
    wait_s = sa.func.coalesce(operations.c.not_before, 0.0) - sa.bindparam("now")
    query = (
        sa.select(operations)
        .where(operations.c.state == OperationState.QUEUED, ~blocked)
        .where((wait_s <= 0) | (wait_s > _LONGEST_WAIT_S))
        .order_by(operations.c.sequence)
    )
    return query if kinds is None else query.where(operations.c.kind.in_(sorted(kinds)))


@cache
def _first_due(kinds: frozenset[str] | None) -> sa.Select[Any]:
    return _due(kinds).limit(1)


class Journal:
    """The journal's part of a store (each call a transaction) or of one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def enqueue(
        self,
        kind: str,
        lock: str,
        arguments: Mapping[str, Any],
        *,
        vm_id: int | None = None,
        image_id: int | None = None,
        datastore_id: int | None = None,
    ) -> Operation:
        """A new QUEUED operation; operations with the same `lock` never run at once."""
        operation_id = f"op-{secrets.token_hex(6)}"
        with self._session.write() as connection:
            values = {
                "id": operation_id,
                "kind": kind,
                "lock": lock,
                "state": OperationState.QUEUED,
                "cancel_requested": False,
                "vm_id": vm_id,
                "image_id": image_id,
                "datastore_id": datastore_id,
                "arguments": dump(arguments),
                "result": dump({}),
                "error": "",
                "queued_at": self._session.now(),
            }
            return operation_of(connection.execute(_NEW, values).one())

    def claim(
        self,
        allowed: Callable[[Operation], bool] | None = None,
        *,
        kinds: frozenset[str] | None = None,
    ) -> Operation | None:
        """The oldest QUEUED operation whose lock no RUNNING one holds, now RUNNING; None: there is none.

        Postponed ones do not count before their time, nor others than those of `kinds`.

        `allowed`, if given, can pass over operations that must wait for something else.
        """
        now = {"now": self._session.now()}
        # Looking first costs no write transaction when there is nothing to do.
        with self._session.read() as connection:
            if connection.execute(_first_due(kinds), now).first() is None:
                return None
        with self._session.write() as connection:
            with connection.execute(_due(kinds), now) as rows:
                chosen = _first_allowed(map(operation_of, rows), allowed)
            if chosen is None:
                return None
            return operation_of(connection.execute(_CLAIM, {"this": chosen.id, **now}).one())

    def finish(
        self,
        operation_id: str,
        state: OperationState,
        *,
        result: Mapping[str, Any] | None = None,
        error: str = "",
    ) -> Operation:
        """End a RUNNING operation; `Conflict` if it does not run."""
        if not state.is_final:
            raise InvalidInput(f"{state} does not end an operation")
        with self._session.write() as connection:
            _require_running(connection, operation_id)
            told = {"result": dump(result or {}), "error": plain_text(error)}
            changes = {"state": state, **told, "ended_at": self._session.now()}
            return _change(connection, operation_id, changes)

    def postpone(
        self, operation_id: str, wait_s: float, *, result: Mapping[str, Any], error: str
    ) -> Operation:
        """Put a RUNNING operation back into the queue for `wait_s`; `Conflict` if it does not run.

        `result` and `error` are those of the attempt that has failed. One whose end was asked for
        meanwhile is CANCELLED instead.
        """
        with self._session.write() as connection:
            _require_running(connection, operation_id)
            now = self._session.now()
            changes: dict[str, Any] = {"state": OperationState.QUEUED, "not_before": now + wait_s}
            if _get(connection, operation_id).cancel_requested:
                changes = {"state": OperationState.CANCELLED, "ended_at": now}
            told = {"result": dump(result), "error": plain_text(error)}
            return _change(connection, operation_id, changes | told)

    def request_cancel(self, operation_id: str) -> Operation:
        """CANCELLED at once if it was QUEUED; a RUNNING one is marked and ends by itself.

        `Conflict` if it has ended already.
        """
        with self._session.write() as connection:
            found = _get(connection, operation_id)
            if found.state.is_final:
                raise Conflict(f"operation {operation_id} has ended already: {found.state}")
            changes: dict[str, Any] = {"cancel_requested": True}
            if found.state is OperationState.QUEUED:
                changes |= {"state": OperationState.CANCELLED, "ended_at": self._session.now()}
            return _change(connection, operation_id, changes)

    def begin_step(self, operation_id: str, name: str, data: Mapping[str, Any] | None = None) -> int:
        """The number of a new step in INTENT; `Conflict` if the operation does not run."""
        with self._session.write() as connection:
            number = 1 + (_require_running(connection, operation_id).last_step or 0)
            values = {
                "operation_id": operation_id,
                "number": number,
                "name": name,
                "state": StepState.INTENT,
                "data": dump(data or {}),
                "result": dump({}),
                "started_at": self._session.now(),
            }
            connection.execute(_NEW_STEP, values)
        return number

    def end_step(
        self,
        operation_id: str,
        number: int,
        state: StepState,
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a step's outcome; a `result` that is None leaves the one that is there.

        `Conflict` if the step cannot come to `state`, or the operation does not run.
        """
        with self._session.write() as connection:
            found = _require_running(connection, operation_id, number)
            if found.name is None:
                raise NotFound(f"operation {operation_id} has no step {number}")
            if state not in STEP_CHANGES[StepState(found.step_state)]:
                raise Conflict(
                    f"operation {operation_id}, step {number} ({found.name}):"
                    f" {found.step_state} cannot become {state}"
                )
            changes: dict[str, Any] = {"state": state, "ended_at": self._session.now()}
            if result is not None:
                changes["result"] = dump(result)
            connection.execute(_CHANGE_STEP, {"this": operation_id, "step": number, **changes})

    def unfinished(self) -> list[Operation]:
        """The RUNNING operations, oldest first: after a start, those whose daemon died."""
        return self.list(state=OperationState.RUNNING)[::-1]

    def overlapping(self, since: float, kinds: Iterable[str]) -> list[Operation]:
        """The operations of these kinds that ran at that time, or were begun later."""
        query = sa.select(operations).where(
            operations.c.kind.in_(sorted(kinds)),
            operations.c.started_at.is_not(None),
            operations.c.ended_at.is_(None) | (operations.c.ended_at >= since),
        )
        with self._session.read() as connection:
            return [operation_of(row) for row in connection.execute(query)]

    def get(self, operation_id: str) -> Operation:
        """The operation; `NotFound` if there is none."""
        with self._session.read() as connection:
            return _get(connection, operation_id)

    def steps(self, operation_id: str) -> list[Step]:
        """The operation's steps in the order they were begun."""
        with self._session.read() as connection:
            return [step_of(row) for row in connection.execute(_STEPS, {"this": operation_id})]

    def prune(self, ended_before: float) -> int:
        """Forget operations that ended before that time, with their steps; how many.

        It looks at the oldest `_PRUNED_AT_ONCE` alone, so that nobody waits long to write.
        """
        oldest = sa.select(operations).order_by(operations.c.sequence).limit(_PRUNED_AT_ONCE).subquery()
        # Only what is final has an end.
        ids = sa.select(oldest.c.id).where(oldest.c.ended_at < ended_before)
        with self._session.write() as connection:
            connection.execute(steps.delete().where(steps.c.operation_id.in_(ids)))
            return connection.execute(operations.delete().where(operations.c.id.in_(ids))).rowcount

    def count(self, state: OperationState) -> int:
        """How many operations are in that state."""
        query = sa.select(sa.func.count()).where(operations.c.state == state)
        with self._session.read() as connection:
            return int(connection.execute(query).scalar_one())

    def list(
        self,
        *,
        state: OperationState | None = None,
        kind: str | None = None,
        vm_id: int | None = None,
        datastore_id: int | None = None,
        limit: int | None = None,
    ) -> list[Operation]:
        """The operations that match, newest first, at most `limit`."""
        given = {
            "state": state,
            "kind": kind,
            "vm_id": vm_id,
            "datastore_id": datastore_id,
        }
        wanted = {f"of_{name}": value for name, value in given.items() if value is not None}
        query = _search(tuple(wanted))
        with self._session.read() as connection:
            found = connection.execute(query if limit is None else query.limit(limit), wanted)
            return [operation_of(row) for row in found]


@cache
def _search(names: tuple[str, ...]) -> sa.Select[Any]:
    query = sa.select(operations).order_by(operations.c.sequence.desc())
    return query.where(*(operations.c[name.removeprefix("of_")] == sa.bindparam(name) for name in names))


def _first_allowed(
    queued: Iterable[Operation], allowed: Callable[[Operation], bool] | None
) -> Operation | None:
    """The first that may run; operations of one lock keep their order even if the first must wait."""
    waiting: set[str] = set()
    for operation in queued:
        if operation.lock not in waiting and (allowed is None or allowed(operation)):
            return operation
        waiting.add(operation.lock)
    return None


def _absent(operation_id: str) -> NotFound:
    hint = "`oned-backup operation list` shows what there is."
    return NotFound(f"there is no operation {operation_id[:40]}", hint=hint)


def _get(connection: sa.Connection, operation_id: str) -> Operation:
    row = connection.execute(_GET, {"this": operation_id}).one_or_none()
    if row is None:
        raise _absent(operation_id)
    return operation_of(row)


def _change(connection: sa.Connection, operation_id: str, changes: Mapping[str, Any]) -> Operation:
    return operation_of(connection.execute(_CHANGE, {"this": operation_id, **changes}).one())


def _require_running(connection: sa.Connection, operation_id: str, number: int = 0) -> Any:
    """What is known of a RUNNING operation and of its step `number`; `Conflict` if it does not run."""
    row = connection.execute(_STATE, {"this": operation_id, "step": number}).one_or_none()
    if row is None:
        raise _absent(operation_id)
    if row.state != OperationState.RUNNING:
        raise Conflict(f"operation {operation_id} is {row.state}, not RUNNING")
    return row
