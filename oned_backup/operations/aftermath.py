"""What became of an operation that failed: in which step, what was taken back, and what to do next.

Told from the journal alone, so also after a restart, for as long as the journal keeps the operation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oned_backup.store import Operation, OperationState, Step, StepState

#: what it means that a step was taken back, where its name does not say so
_UNDONE: Mapping[tuple[str, str], str] = {
    ("backup", "PREPARE"): "the guest runs as before, nothing of ours is left on its host",
    ("backup", "STORE"): "nothing of it is in the store",
    ("restore", "PREPARE"): "nothing of it is in the target directory",
    ("download", "PREPARE"): "nothing of it is in the target directory",
    ("download", "DOWNLOAD"): "the partial file is removed",
    ("flatten", "MERGE"): "the old chain is as it was",
}

#: for errors that bring no hint of their own, by their class
_NEXT: Mapping[str, str] = {
    "Unavailable": "See that host and store can be reached (`oned-backup doctor`), then start it again.",
    "Busy": "Somebody else was at it: start it again later.",
    "NoSpace": "Make room there, then start it again.",
    "DataCorrupt": "`oned-backup image verify` tells what is damaged; the next backup begins a new chain.",
    "NotFound": "See what is there with `oned-backup vm list` and `oned-backup image list`.",
    "PermissionDenied": "Correct the key, password or ownership, then start it again.",
    "Misconfigured": "Correct the setting, then start it again.",
    "InvalidInput": "Correct what was given, then start it again.",
    "NothingToBackUp": "See `oned-backup vm show`; correct DISK_IDS with `vm set`, or leave this VM out.",
    "Conflict": "Wait for what uses it, or name something else, then start it again.",
    "Unsupported": "Choose another store or host driver: this one cannot do it.",
    "Cancelled": "Start it again if it is still wanted.",
    "DriverBug": "The driver breaks its contract: `oned-backup driver check` and the daemon's log tell more.",
}
_NEXT_OTHERWISE = "The daemon's log tells more; start it again when the cause is gone."


@dataclass(frozen=True)
class Aftermath:
    """`undone`: what was taken back; `left`: undos that failed themselves; `step`: empty before the first."""

    step: str
    undone: tuple[str, ...]
    left: tuple[str, ...]
    next: str


def aftermath_of(operation: Operation, steps: Sequence[Step]) -> Aftermath | None:
    """What there is to tell of a FAILED or CANCELLED operation; None for any other."""
    if operation.state not in {OperationState.FAILED, OperationState.CANCELLED}:
        return None
    newest = max((int(step.data.get("attempt", 1)) for step in steps), default=1)
    last = [step for step in steps if int(step.data.get("attempt", 1)) == newest]
    forward = [step for step in last if "undoes" not in step.data]
    undone = [step.name for step in reversed(forward) if step.state is StepState.UNDONE]
    return Aftermath(
        step=forward[-1].name if forward else "",
        undone=tuple(
            f"{name}: {text}" if (text := _UNDONE.get((operation.kind, name))) else name for name in undone
        ),
        left=tuple(
            f"{step.name}: {_message(step)}"
            for step in last
            if "undoes" in step.data and step.state is StepState.FAILED
        ),
        next=_next(operation),
    )


def _message(step: Step) -> str:
    error = step.result.get("error", "")
    return str(json.loads(error).get("message", "")) if error else "it was interrupted"


def _next(operation: Operation) -> str:
    error = json.loads(operation.error) if operation.error else {}
    if operation.state is OperationState.CANCELLED and not error:
        error = {"code": "Cancelled"}
    return str(error.get("hint") or _NEXT.get(str(error.get("code")), _NEXT_OTHERWISE))
