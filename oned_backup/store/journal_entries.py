"""What the journal holds, and how its tables have it: operations, their steps, and the states of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from oned_backup.errors import InvalidInput


class OperationState(StrEnum):
    """Where an operation stands; the last three are final."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen."""
        return self in {OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED}


class StepState(StrEnum):
    """Where a step stands. INTENT: its effect may exist, wholly or partly."""

    INTENT = "INTENT"
    DONE = "DONE"
    FAILED = "FAILED"
    UNDONE = "UNDONE"


#: what a step may come to
STEP_CHANGES = {
    StepState.INTENT: {StepState.DONE, StepState.FAILED, StepState.UNDONE},
    StepState.DONE: {StepState.UNDONE},
    StepState.FAILED: {StepState.UNDONE},
    StepState.UNDONE: set(),
}


@dataclass(frozen=True)
class Operation:
    """An operation as it stands in the journal; times in seconds since 1970.

    One that was postponed is QUEUED with `not_before`, and with the `error` and `result` of its last
    attempt; `started_at` is the first attempt's.
    """

    id: str
    kind: str
    lock: str
    state: OperationState
    cancel_requested: bool
    vm_id: int | None
    image_id: int | None
    datastore_id: int | None
    arguments: Mapping[str, Any]
    result: Mapping[str, Any]
    error: str
    queued_at: float
    started_at: float | None
    ended_at: float | None
    not_before: float | None = None


@dataclass(frozen=True)
class Step:
    """A step: `data` was written with the intent, `result` with the outcome."""

    operation_id: str
    number: int
    name: str
    state: StepState
    data: Mapping[str, Any]
    result: Mapping[str, Any]
    started_at: float
    ended_at: float | None


def operation_of(row: sa.Row[Any]) -> Operation:
    """The operation that a row of `operations` tells."""
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name
    del values["sequence"]
    for name in ("arguments", "result"):
        values[name] = json.loads(values[name])
    return Operation(**{**values, "state": OperationState(values["state"])})


def step_of(row: sa.Row[Any]) -> Step:
    """The step that a row of `steps` tells."""
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name
    for name in ("data", "result"):
        values[name] = json.loads(values[name])
    return Step(**{**values, "state": StepState(values["state"])})


def plain_text(text: str) -> str:
    """`text` without what is no Unicode, such as the undecodable bytes of a file name."""
    return text.encode(errors="replace").decode()


def dump(values: Mapping[str, Any]) -> str:
    """The text of a column of plain data; `InvalidInput` if it is none."""
    try:
        return json.dumps(values, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"journal: not plain data: {error}") from error
