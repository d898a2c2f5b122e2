"""RETENTION of a VM: decide what stays, and queue what is to be done about the rest.

    APPLY    one transaction: images of which nothing is kept are put out of use, ends of chains are
             cut off, a `flatten` is queued for each run of increments to merge, and `remove` for all that
             is to go from a store, also what an earlier `remove` could not reach          commits

It is queued by each successful backup of a VM with settings of retention, and on demand. What it would
do, and why, can be asked for at any time without doing it (`look`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oned_backup.contract.actions import Kind
from oned_backup.errors import Conflict, NotFound
from oned_backup.model.datastore import Datastore
from oned_backup.model.image import Image, ImageState
from oned_backup.model.manifest import parse_manifest
from oned_backup.model.names import job_repository
from oned_backup.model.pruning import pinned
from oned_backup.model.retention import Fate, Merge, Point, RetentionPlan, Verdict, plan_retention
from oned_backup.model.vm import Vm
from oned_backup.operations.context import Context
from oned_backup.operations.delete import cut_off, mark_image, owing, queue_removal
from oned_backup.operations.engine import OperationKind, result_of
from oned_backup.operations.exclusion import retention_lock
from oned_backup.operations.services import Services
from oned_backup.operations.steps import Step
from oned_backup.store import BackupState, Operation, OperationState, RestorePoint, Transaction


def look(services: Services, tx: Transaction, vm_id: int) -> RetentionPlan:
    """What retention does with the VM's restore points as they are now."""
    vm = Vm(tx.get("vm", vm_id).element)
    points: list[Point] = []
    unmergeable, ours = set(), set()
    for image in _images(tx, vm_id):
        if image.state == ImageState.DELETE:
            continue
        rows = tx.backups(image_id=image.id)
        points += _points(image, rows)
        if image.datastore_id not in ours and _made_here(services, rows):
            ours.add(image.datastore_id)
        datastore = Datastore(tx.get("datastore", image.datastore_id).element)
        if job_repository(image.source) or not _can_merge(services, datastore):
            unmergeable.add(image.id)
    config = vm.config
    active = config.incremental_backup_id if config.has_chain else -1
    return plan_retention(
        points,
        config.rules,
        active_image=active,
        unmergeable=unmergeable,
        imported={point.store for point in points} - ours,
    )


def verdicts_view(plan: RetentionPlan) -> list[dict[str, Any]]:
    """What becomes of each restore point and why, as plain values."""
    return [_view(verdict) for verdict in plan.verdicts]


def refuse_kept(services: Services, tx: Transaction, vm_id: int, merge: Merge) -> None:
    """`Conflict` if a point that is to be merged into a later one is to be kept by now.

    Settings change, and what was found damaged meanwhile does not count any more.
    """
    for verdict in look(services, tx, vm_id).verdicts:
        image_id, number = verdict.point.key
        if image_id == merge.image_id and number in merge.increment_ids[:-1] and verdict.fate is Fate.KEPT:
            raise Conflict(f"increment {number} of image {image_id} is to be kept: {verdict.reasons[0]}")


def queue_flatten(tx: Transaction, vm_id: int, merge: Merge) -> Operation:
    """Queue the merge of a run of increments; it is carried out only if the settings still want it."""
    arguments = {
        "vm_id": vm_id,
        "image_id": merge.image_id,
        "increment_ids": list(merge.increment_ids),
        "by_settings": True,
    }
    return tx.journal.enqueue(
        "flatten", retention_lock(vm_id), arguments, vm_id=vm_id, image_id=merge.image_id
    )


def _view(verdict: Verdict) -> dict[str, Any]:
    point = verdict.point
    return {
        "image_id": point.image_id,
        "increment_id": point.increment_id,
        "date": point.date,
        "size_mb": point.size_mb,
        "good": point.good,
        "pinned": point.pinned,
        "fate": verdict.fate.value,
        "into": verdict.into,
        "reasons": list(verdict.reasons),
    }


def _images(tx: Transaction, vm_id: int) -> list[Image]:
    return [Image(entry.element) for entry in tx.find("image", vm_id=vm_id)]


def _points(image: Image, rows: Sequence[RestorePoint]) -> list[Point]:
    good = {row.increment_id for row in rows if row.state is BackupState.GOOD and image.is_ready}
    kept = pinned(image)
    entries = [(entry.id, entry.date, entry.size_mb) for entry in image.increments]
    return [
        Point(image.id, number, date, size_mb, number in good, number in kept, image.datastore_id)
        for number, date, size_mb in entries or [(0, image.created, image.size_mb)]
    ]


def _made_here(services: Services, rows: Sequence[RestorePoint]) -> bool:
    """Whether one of these backups was made by this installation, and not imported."""
    manifests = (parse_manifest(row.manifest, what=f"backup {row.backup_id}") for row in reversed(rows))
    return any(manifest.raw.get("installation") == services.store.installation for manifest in manifests)


def _can_merge(services: Services, datastore: Datastore) -> bool:
    try:
        return services.driver(Kind.DATASTORE, datastore.ds_mad).supports("increment_flatten")
    except NotFound:
        return False


def _apply(context: Context, tx: Transaction) -> Mapping[str, Any]:
    vm_id = context.integer("vm_id")
    plan = look(context.services, tx, vm_id)
    for image_id in plan.images:
        mark_image(tx, image_id)
    for image_id, increment_ids in plan.cuts:
        cut_off(tx, image_id, increment_ids)
    queued = _queue_merges(tx, vm_id, plan)
    queued += [queue_removal(tx, vm_id, image_ids).id for image_ids in _owing(tx, vm_id)]
    return {"vm_id": vm_id, "points": verdicts_view(plan), "queued": queued}


def _owing(tx: Transaction, vm_id: int) -> list[list[int]]:
    """The images that something is to be removed of, by datastore: one that is gone keeps no other full."""
    found: dict[int, list[int]] = {}
    for image in _images(tx, vm_id):
        if owing(image):
            found.setdefault(image.datastore_id, []).append(image.id)
    return list(found.values())


def _queue_merges(tx: Transaction, vm_id: int, plan: RetentionPlan) -> list[str]:
    """Queue the merges. While one is queued already, only a further look for when it is done."""
    waiting = [
        other
        for other in tx.journal.list(state=OperationState.QUEUED, vm_id=vm_id)
        if other.kind in {"flatten", "retention"}
    ]
    if any(other.kind == "flatten" for other in waiting):
        if plan.merges and not any(other.kind == "retention" for other in waiting):
            tx.journal.enqueue("retention", retention_lock(vm_id), {"vm_id": vm_id}, vm_id=vm_id)
        return [other.id for other in waiting]
    return [queue_flatten(tx, vm_id, merge).id for merge in plan.merges]


RETENTION = OperationKind(
    name="retention",
    steps=(Step("APPLY", record=_apply, commits=True),),
    result=result_of("vm_id", "points", "queued"),
    requeue=True,
)
