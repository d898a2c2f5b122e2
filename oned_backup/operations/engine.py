"""Runs an operation by its transition table, with the journal written ahead of every effect.

One attempt is one walk through the table. When it ends in FAILED, the kind of
operation decides whether to walk again (a host that could not be reached, a
guest that changed its state in the middle); before that everything was undone. Unless the
wait is short the operation goes back into the queue for it: it holds no worker and no lock.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from oned_backup import failpoints
from oned_backup.errors import Cancelled, DriverFailed, NoSpace, OnedBackupError, PermissionDenied
from oned_backup.operations.context import Context, describe
from oned_backup.operations.steps import DONE, FAILED, Event, Step, Undo, doing, transitions, undoing
from oned_backup.store import OperationState, StepState

logger = logging.getLogger(__name__)

#: what must be done in any case is tried so often, when what it needs cannot be reached or its driver dies
_TRIES = 3
#: a shorter wait for the next attempt is not worth the queue
_SHORT_S = 1.0

_KNOWN_ERRORS: Mapping[int | None, type[OnedBackupError]] = {
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EFBIG: NoSpace,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EROFS: PermissionDenied,
}


@dataclass(frozen=True)
class FailedAttempt:
    """Why an attempt failed: in which step, and when the first attempt began (seconds since 1970)."""

    step: str
    error: OnedBackupError
    began: float


def retry_wait(context: Context, failed: FailedAttempt) -> float | None:
    """How long to wait before the next attempt; None: give up. Doubles from attempt to attempt."""
    retry = context.services.settings.retry
    wait = min(retry.first_wait_s * 2 ** (context.attempt - 1), retry.longest_wait_s)
    late = time.time() + wait > failed.began + retry.for_s
    return None if late or not failed.error.retryable else wait


def no_result(_context: Context) -> Mapping[str, Any]:
    """Nothing to tell."""
    return {}


def result_of(*names: str) -> Callable[[Context], Mapping[str, Any]]:
    """A `result` that tells these of an operation's facts, as far as there are any."""
    return lambda context: {name: context.facts[name] for name in names if name in context.facts}


def nothing_after(_context: Context, _state: OperationState, _error: OnedBackupError | None) -> None:
    """Nothing to do."""


@dataclass(frozen=True)
class OperationKind:
    """A kind of operation: its steps and what is particular about it.

    `again` says how long to wait before another attempt, None to give up.
    `result` is what a finished operation tells. `ended` runs last, whatever the end was.
    """

    name: str
    steps: tuple[Step, ...]
    again: Callable[[Context, FailedAttempt], float | None] = retry_wait
    result: Callable[[Context], Mapping[str, Any]] = no_result
    ended: Callable[[Context, OperationState, OnedBackupError | None], None] = nothing_after
    #: after a restart of the daemon it is queued again, since half of it is worse than all of it
    requeue: bool = False


@dataclass
class _Walk:
    """One walk through the table: what was begun, and the first error."""

    kind: OperationKind
    context: Context
    state: str
    #: journal numbers of the steps begun
    numbers: dict[str, int] = field(default_factory=dict)
    committed: bool = False
    error: OnedBackupError | None = None
    failed_step: str = ""

    def run(self) -> None:
        """Walk until DONE or FAILED."""
        table = transitions(self.kind.steps)
        states = {doing(step): (step, self._do) for step in self.kind.steps}
        states |= {undoing(step): (step, self._undo) for step in self.kind.steps}
        while self.state not in {DONE, FAILED}:
            step, act = states[self.state]
            self.state = table[self.state, act(step)]

    def _do(self, step: Step) -> Event:
        context = self.context
        journal = context.services.store.journal
        context.step = step.name
        context.report(step.name, 0, 0)
        try:
            if not self.committed:
                context.check_cancelled()
            intent = dict(step.intend(context)) if step.intend else {}
            self._reach(step.name, "intend")
            number = journal.begin_step(
                context.operation.id, step.name, {"attempt": context.attempt, **intent}
            )
            self.numbers[step.name] = number
            context.facts |= intent
            self._reach(step.name, "begun")
            if self.committed:
                with context.uncancellable():
                    self._persistently(lambda _context: self._effect(step, number))
            else:
                self._effect(step, number)
        except Exception as error:  # noqa: BLE001 - whatever happened, what was begun must be undone
            self._failed(step, error)
            return Event.ERROR
        self.committed = self.committed or step.commits
        return Event.OK

    def _effect(self, step: Step, number: int) -> None:
        context = self.context
        store = context.services.store
        outcome = dict(step.do(context) or {}) if step.do is not None else {}
        if step.record is not None:
            with store.transaction() as tx:
                outcome |= step.record(context, tx) or {}
                self._reach(step.name, "acted")
                tx.journal.end_step(context.operation.id, number, StepState.DONE, outcome)
        else:
            self._reach(step.name, "acted")
            store.journal.end_step(context.operation.id, number, StepState.DONE, outcome)
        self._reach(step.name, "ended")
        context.facts |= outcome

    def _failed(self, step: Step, error: Exception) -> None:
        known = as_known(error)
        context = self.context
        if self.committed:
            context.note(f"{step.name} failed after the result was safe: {known}")
        elif self.error is None:
            self.error, self.failed_step = known, step.name
        number = self.numbers.get(step.name)
        if number is not None:
            self._end(number, StepState.FAILED, {"error": describe(known)})

    def _undo(self, step: Step) -> Event:
        undo = step.undo
        assert undo is not None, step.name  # noqa: S101 - the table leads here only then
        context = self.context
        if step.name not in self.numbers:  # it comes after an urgent one, and was not begun
            return Event.OK
        context.step = undo.name
        context.report(undo.name, 0, 0)
        number = self._begin_undo(step, undo)
        self._reach(f"undo-{step.name}", "begun")
        try:
            with context.uncancellable():
                self._persistently(undo.run)
            self._reach(f"undo-{step.name}", "acted")
        except Exception as error:  # noqa: BLE001 - the other undos must still run
            known = as_known(error)
            context.note(f"{undo.name} did not succeed, something may be left behind: {known}")
            if number is not None:
                self._end(number, StepState.FAILED, {"error": describe(known)})
            return Event.ERROR
        if number is not None:
            self._end(number, StepState.DONE)
        self._end(self.numbers[step.name], StepState.UNDONE)
        self._reach(f"undo-{step.name}", "ended")
        return Event.OK

    def _reach(self, name: str, moment: str) -> None:
        failpoints.reach(f"{self.kind.name}.{name}.{moment}")

    def _begin_undo(self, step: Step, undo: Undo) -> int | None:
        """The undo's number in the journal; None if that cannot be written, which must not stop it.

        What it undoes has an intent there already, so nothing is lost by that.
        """
        context = self.context
        try:
            return context.services.store.journal.begin_step(
                context.operation.id, undo.name, {"attempt": context.attempt, "undoes": step.name}
            )
        except Exception:
            logger.exception("journal of %s cannot be written", context.operation.id)
            return None

    def _persistently(self, run: Callable[[Context], None]) -> None:
        """Run an undo, or what follows the commit; again after a short while if that may help."""
        for tried in range(1, _TRIES + 1):
            try:
                return run(self.context)
            except OnedBackupError as error:
                may_help = error.retryable or type(error) is DriverFailed
                if not may_help or tried == _TRIES or self.context.recovering:
                    raise
            self.context.cancellation.wait(self.context.services.settings.retry.first_wait_s)
        return None

    def _end(self, number: int, state: StepState, result: Mapping[str, Any] | None = None) -> None:
        """Write how a step ended; the journal being out of reach must not stop the undoing."""
        try:
            self.context.services.store.journal.end_step(self.context.operation.id, number, state, result)
        except Exception:
            logger.exception("journal of %s cannot be written", self.context.operation.id)


def run_operation(kind: OperationKind, context: Context) -> OperationState:
    """Carry out `context.operation`: its end, or QUEUED if it is to be tried again later.

    Which of them it came to is in the journal afterwards.
    """
    began = context.operation.started_at or time.time()
    while True:
        walk = _Walk(kind, context, doing(kind.steps[0]))
        try:
            walk.run()
        finally:
            context.discard_waiting()
        if walk.state == DONE:
            return finish(kind, context, OperationState.DONE, None)
        error = walk.error or DriverFailed("failed without an error")
        wait = None if isinstance(error, Cancelled) else _next_wait(kind, context, walk, error, began)
        if wait is None:
            return finish(kind, context, end_of(error), error)
        context.note(f"attempt {context.attempt}: {walk.failed_step}: {error}")
        if wait >= _SHORT_S and not context.cancellation.cancelled:
            return _postpone(kind, context, wait, error)
        if context.cancellation.wait(wait):
            return finish(kind, context, OperationState.CANCELLED, _cancelled(error))
        context.attempt += 1
        context.facts.clear()


def _postpone(kind: OperationKind, context: Context, wait_s: float, error: OnedBackupError) -> OperationState:
    _tell_end(kind, context, OperationState.FAILED, error)
    result = {"notes": list(context.notes), "attempts": context.attempt}
    put_back = context.services.store.journal.postpone(
        context.operation.id, wait_s, result=result, error=describe(error)
    )
    context.remove_work_dir()
    return put_back.state


def go_on(kind: OperationKind, context: Context, state: str, numbers: Mapping[str, int]) -> str:
    """Continue an interrupted attempt at `state` of the table; returns DONE or FAILED."""
    walk = _Walk(kind, context, state, numbers=dict(numbers), committed=state.startswith("do:"))
    walk.run()
    return walk.state


def finish(
    kind: OperationKind, context: Context, state: OperationState, error: OnedBackupError | None
) -> OperationState:
    """Write the operation's end to the journal and clear away what it kept for itself."""
    context.step = "END"
    _tell_end(kind, context, state, error)
    result = dict(kind.result(context)) if state is OperationState.DONE else partial_result(kind, context)
    if context.notes:
        result["notes"] = list(context.notes)
    if context.attempt > 1:
        result["attempts"] = context.attempt
    failpoints.reach(f"{kind.name}.END.acted")
    context.services.store.journal.finish(
        context.operation.id, state, result=result, error="" if error is None else describe(error)
    )
    failpoints.reach(f"{kind.name}.END.ended")
    context.remove_work_dir()
    return state


def _tell_end(
    kind: OperationKind, context: Context, state: OperationState, error: OnedBackupError | None
) -> None:
    try:
        kind.ended(context, state, error)
    except Exception as trouble:
        logger.exception("%s %s: after its end", kind.name, context.operation.id)
        context.note(f"after the end: {trouble}")


def partial_result(kind: OperationKind, context: Context) -> dict[str, Any]:
    """What a failed operation can tell nevertheless."""
    try:
        return dict(kind.result(context))
    except (KeyError, OnedBackupError):
        return {}


def end_of(error: OnedBackupError) -> OperationState:
    """The state in which an operation ends that failed with `error`."""
    return OperationState.CANCELLED if isinstance(error, Cancelled) else OperationState.FAILED


def _cancelled(error: OnedBackupError) -> Cancelled:
    return Cancelled(f"cancelled while waiting to try again after: {error}")


def as_known(error: Exception) -> OnedBackupError:
    """`error`, or for a fault of our own one that says so (its traceback is in the daemon's log)."""
    if isinstance(error, OnedBackupError):
        return error
    if isinstance(error, OSError) and error.errno in _KNOWN_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return _KNOWN_ERRORS[error.errno](f"{where}{error.strerror}")
    logger.error("unexpected", exc_info=error)
    return DriverFailed(
        f"internal error: {type(error).__name__}: {error}", hint="The daemon's log has the traceback."
    )


def _next_wait(
    kind: OperationKind, context: Context, walk: _Walk, error: OnedBackupError, began: float
) -> float | None:
    if context.cancellation.cancelled:
        return None
    try:
        return kind.again(context, FailedAttempt(walk.failed_step, error, began))
    except OnedBackupError:
        return None
