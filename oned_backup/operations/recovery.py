"""At the daemon's start: bring every operation that was running to its end, within 30 s.

For each one: end what is left of its driver, go through its journal, then forward if it
had committed (RECORD done: the backup exists; only CLEAN is missing), else
backward, with the guest thawed and the backup job ended first. What cannot be
cleaned because a host or store is out of reach is told in the operation's
notes; the next backup of the VM cleans it.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from oned_backup.errors import OnedBackupError, Unavailable
from oned_backup.model.vm import Vm, backup_ended
from oned_backup.operations.context import Context, describe
from oned_backup.operations.engine import finish, go_on
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.locks import end_old_drivers, held, lock_path
from oned_backup.operations.services import Services
from oned_backup.operations.steps import DONE, FAILED, resume_at
from oned_backup.store import Operation, OperationState, Step

logger = logging.getLogger(__name__)

#: for one operation's calls of drivers; with ending its driver (2 × 2 s) it stays below 30 s
BUDGET_S = 22.0
_GRACE_S = 2.0
#: operations that are brought to their end at a time
_WORKERS = 16


def recover(services: Services) -> tuple[Operation, ...]:
    """End all interrupted operations; returns them as they ended."""
    unfinished = services.store.journal.unfinished()
    began = time.monotonic()
    with ThreadPoolExecutor(max_workers=max(min(_WORKERS, len(unfinished)), 1)) as pool:
        list(pool.map(lambda operation: _recover_one(services, operation, began + BUDGET_S), unfinished))
    for row in services.store.rows("vm"):
        if row["state"].startswith("BACKUP"):  # its operation ended without telling it
            services.store.change("vm", row["id"], lambda element: backup_ended(Vm(element)).element)
    return tuple(services.store.journal.get(operation.id) for operation in unfinished)


def _recover_one(services: Services, operation: Operation, budget_until: float) -> None:
    try:
        _bring_to_end(services, operation, budget_until)
    except Exception:
        logger.exception("recovery of %s", operation.id)
        error = describe(_restarted("and its journal could not be followed"))
        services.store.journal.finish(operation.id, OperationState.FAILED, error=error)


def _bring_to_end(services: Services, operation: Operation, budget_until: float) -> None:
    kind = KINDS[operation.kind]
    run_dir = services.settings.run_dir
    context = Context(
        services,
        operation,
        recovering=True,
        budget_until=budget_until,
        log=partial(_log, operation),
    )
    if not end_old_drivers(run_dir, operation.id, grace_s=_GRACE_S):
        # Killed, it does nothing more but what the kernel does for it at the moment.
        context.note("a driver of the old daemon hangs in the kernel: it ends when that lets it go")
        context.driver_hangs = True
        lock_path(run_dir, operation.id).unlink(missing_ok=True)  # that one stays its own
    steps = _last_attempt(services.store.journal.steps(operation.id))
    context.attempt = max((int(step.data.get("attempt", 1)) for step in steps), default=1)
    for step in steps:
        context.facts |= {name: value for name, value in step.data.items() if name != "attempt"}
        context.facts |= _outcome(step)
    state = resume_at(kind.steps, [(step.name, step.state) for step in steps])
    numbers = {step.name: step.number for step in steps}
    with held(run_dir, operation.id) as context.lock_fd:
        end = state if state in {DONE, FAILED} else go_on(kind, context, state, numbers)
    if end == DONE:
        finish(kind, context, OperationState.DONE, None)
        return
    cause: OnedBackupError = _restarted(f"in step {steps[-1].name}" if steps else "before its first step")
    asked = OperationState.CANCELLED if operation.cancel_requested else OperationState.FAILED
    finish(kind, context, asked, cause)
    queue_again(services, operation)


def _log(operation: Operation, level: int, line: str) -> None:
    """What is worth a warning (syslog's 4); recovery is short, the rest is noise."""
    if level <= 4:
        logger.warning("%s: %s", operation.id, line)


def queue_again(services: Services, operation: Operation) -> None:
    """Queue an operation that the daemon's end interrupted, if half of it is worse than all of it."""
    if KINDS[operation.kind].requeue and not operation.cancel_requested:
        services.store.journal.enqueue(
            operation.kind,
            operation.lock,
            operation.arguments,
            vm_id=operation.vm_id,
            image_id=operation.image_id,
            datastore_id=operation.datastore_id,
        )


def _last_attempt(steps: list[Step]) -> list[Step]:
    """The steps of the newest attempt, without the undos themselves."""
    newest = max((int(step.data.get("attempt", 1)) for step in steps), default=1)
    return [
        step for step in steps if int(step.data.get("attempt", 1)) == newest and "undoes" not in step.data
    ]


def _outcome(step: Step) -> dict[str, Any]:
    return {} if "error" in step.result else dict(step.result)


def _restarted(where: str) -> Unavailable:
    return Unavailable(f"daemon restarted {where}", hint="Start the operation again.")
