"""Operations as sequences of steps, and the table that says what follows what.

A step writes its intent (all that is needed to undo it, names chosen before)
into the journal, then has its effect, then writes its outcome. An operation
goes forward through its steps; when one fails, the undos of all steps that were
begun run backwards, the failed step's first, except that an undo which is *urgent*
comes before all others: a guest does not wait for a store that hangs. A step that *commits* is the point
of no return: from then on the operation only goes forward, and a failure
after it is a warning, because what the operation was for has been reached.

    do:PLAN ─ok→ do:PREPARE ─ok→ do:STORE ─ok→ do:RECORD ═ok═> do:CLEAN ─ok→ DONE
       │error        │error         │error        │error           │error → DONE, warning
       │             v              v             v
       v       undo:PREPARE (urgent) <────────────┘
     FAILED <── undo:STORE, if STORE was begun

The engine walks the table that `transitions` makes; tests walk it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from oned_backup.store import StepState

if TYPE_CHECKING:
    from oned_backup.operations.context import Context
    from oned_backup.store import Transaction

#: what a step leaves in the journal: plain JSON values
Data = Mapping[str, Any]


@dataclass(frozen=True)
class Undo:
    """Takes back a step, from the journal's data alone; may be called when nothing was done yet."""

    #: the name of the undo in the journal
    name: str
    run: Callable[[Context], None]
    #: when this undo fails, what the earlier steps made is still in use: leave it
    guards: bool = False
    #: runs before the undos of later steps, which it does not depend on
    urgent: bool = False


@dataclass(frozen=True)
class Step:
    """One effect of an operation: `do`, `record`, or the one after the other.

    `record` runs inside a transaction that also carries the step's outcome in the
    journal, so both are there or neither. `intend` returns what must be known to undo.
    """

    name: str
    do: Callable[[Context], Data | None] | None = None
    record: Callable[[Context, Transaction], Data | None] | None = None
    intend: Callable[[Context], Data] | None = None
    undo: Undo | None = None
    commits: bool = False


class Event(StrEnum):
    """How a step or an undo ended."""

    OK = "ok"
    ERROR = "error"


DONE = "DONE"
FAILED = "FAILED"


def doing(step: Step) -> str:
    """The state in which `step` runs."""
    return f"do:{step.name}"


def undoing(step: Step) -> str:
    """The state in which the undo of `step` runs."""
    return f"undo:{step.name}"


def transitions(steps: tuple[Step, ...]) -> dict[tuple[str, Event], str]:
    """What follows each state on each event; DONE and FAILED have no followers.

    After an urgent undo the undos of later steps follow, also of those that were not
    begun: for these there is nothing to do.
    """
    table = {}
    committed = False
    order = _undo_order(steps)
    for place, step in enumerate(steps):
        forward = doing(steps[place + 1]) if place + 1 < len(steps) else DONE
        table[doing(step), Event.OK] = forward
        table[doing(step), Event.ERROR] = forward if committed else undo_of(steps[: place + 1])
        committed = committed or step.commits
    for place, step in enumerate(order):
        back = undoing(order[place + 1]) if place + 1 < len(order) else FAILED
        table[undoing(step), Event.OK] = back
        table[undoing(step), Event.ERROR] = FAILED if step.undo and step.undo.guards else back
    return table


def undo_of(begun: tuple[Step, ...]) -> str:
    """The first state of undoing the steps `begun`."""
    return next((undoing(step) for step in _undo_order(begun)), FAILED)


def _undo_order(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """The steps that have an undo, in the order in which they are undone."""
    backwards = [step for step in reversed(steps) if step.undo]
    return tuple(sorted(backwards, key=lambda step: step.undo is None or not step.undo.urgent))


def resume_at(steps: tuple[Step, ...], journal: Sequence[tuple[str, StepState]]) -> str:
    """Where an interrupted attempt goes on, from its journal of (step name, state), oldest first.

    Forward if a committing step is DONE, else backward; FAILED if there is nothing to undo.
    """
    done = {name for name, state in journal if state is StepState.DONE}
    gone = {name for name, state in journal if state is StepState.UNDONE}
    begun = {name for name, _ in journal} - gone
    if any(step.commits and step.name in done for step in steps):
        return next((doing(step) for step in steps if step.name not in done), DONE)
    return undo_of(tuple(step for step in steps if step.name in begun))
