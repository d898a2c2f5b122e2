"""PRUNE: let a store free the space of what was removed, where removing alone does not.

One step, which may be repeated or broken off at any time: what it did stays done. It belongs to
the background and takes no VM's lock; how it gets along with backups is its driver's affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oned_backup.contract.actions import Kind
from oned_backup.contract.result import whole_number
from oned_backup.errors import OnedBackupError, Unsupported
from oned_backup.model.datastore import Datastore
from oned_backup.operations.context import Context
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.exclusion import prune_lock
from oned_backup.operations.services import Services
from oned_backup.operations.steps import Step
from oned_backup.store import Operation


def can_prune(services: Services, datastore: Datastore) -> bool:
    """Whether the datastore's driver has something to do there."""
    try:
        return services.driver(Kind.DATASTORE, datastore.ds_mad).supports("prune")
    except OnedBackupError:
        return False


def refuse_without_prune(services: Services, datastore: Datastore) -> None:
    """`Unsupported` if the datastore's driver has nothing to do there."""
    if not can_prune(services, datastore):
        raise Unsupported(
            f"datastore {datastore.id} ({datastore.name}): removing frees the space at once:"
            " there is nothing to prune"
        )


def due(services: Services) -> list[int]:
    """The datastores that were not pruned for `prune_every_h`; one whose prune is queued is not due."""
    every_s = services.settings.prune_every_h * 3600
    if not every_s:
        return []
    found = []
    for entry in services.store.find("datastore"):
        datastore = Datastore(entry.element)
        if not can_prune(services, datastore):
            continue
        last = services.store.journal.list(kind="prune", datastore_id=datastore.id, limit=1)
        began = last[0].queued_at if last else 0.0
        waiting = bool(last) and not last[0].state.is_final
        if not waiting and abs(services.clock() - began) >= every_s:
            found.append(datastore.id)
    return found


def queue(services: Services, datastore_id: int) -> Operation:
    """Queue the prune of a datastore."""
    arguments = {"datastore_id": datastore_id}
    journal = services.store.journal
    return journal.enqueue("prune", prune_lock(datastore_id), arguments, datastore_id=datastore_id)


def _prune(context: Context) -> Mapping[str, Any]:
    services = context.services
    datastore = services.datastore(context.integer("datastore_id"))
    refuse_without_prune(services, datastore)
    answer = context.caller.datastore("prune", datastore)
    services.measured_at.pop(datastore.id, None)  # there may be more room now
    return {"freed_mb": whole_number(answer, "FREED_MB") if "FREED_MB" in answer else 0}


def _result(context: Context) -> Mapping[str, Any]:
    return {"freed_mb": context.facts.get("freed_mb", 0)}


PRUNE = OperationKind(name="prune", steps=(Step("PRUNE", do=_prune),), result=_result)
