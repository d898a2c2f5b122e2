"""What a finished backup changes in the catalogue, in one transaction, and what the next one reads of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from oned_backup.contract.exports import DiskExport, Exports, Reason
from oned_backup.errors import Busy, DriverBug
from oned_backup.model import datastore as datastores
from oned_backup.model.backup_config import Mode
from oned_backup.model.datastore import Datastore
from oned_backup.model.image import Image, image_name, new_image, with_increment
from oned_backup.model.increments import BackupType, Increment, next_increment
from oned_backup.model.manifest import Manifest, parse_manifest
from oned_backup.model.pruning import with_to_remove
from oned_backup.model.vm import Vm, with_backup, with_config
from oned_backup.operations.backup_plan import BackupPlan, exports_of, plan_of
from oned_backup.operations.context import Context
from oned_backup.operations.stored import recorded
from oned_backup.store import BackupState, RestorePoint, StepState, Store, Transaction


def record_backup(context: Context, tx: Transaction) -> Mapping[str, Any]:
    """Enter the stored backup: image or increment, VM, datastore, restore point."""
    plan = plan_of(context)
    exports = exports_of(context)
    if exports is None:
        raise DriverBug("a backup without EXPORTS cannot be recorded")
    size_mb = int(context.facts["size_mb"])
    stored = tx.get("vm", plan.vm_id)
    vm = Vm(stored.element)
    if exports.type is BackupType.INCREMENT and plan.image_id is not None:
        image_id, increment_id = _add_increment(tx, plan, exports, size_mb)
    else:
        image_id = _add_image(context, tx, plan, exports=exports, vm=vm, size_mb=size_mb)
        increment_id = 0
    tx.add_backup(
        RestorePoint(
            backup_id=plan.backup_id,
            image_id=image_id,
            increment_id=increment_id,
            vm_id=vm.id,
            datastore_id=plan.datastore_id,
            manifest=context.facts["manifest"],
            stored_at=context.services.clock(),
        )
    )
    config = replace(vm.config.without_chain(), last_datastore_id=plan.datastore_id)
    if plan.checkpoint and config.mode is Mode.INCREMENT:
        config = replace(config, incremental_backup_id=image_id, last_increment_id=increment_id)
    tx.update("vm", vm.id, stored.version, with_config(with_backup(vm, image_id), config).element)
    return {"image_id": image_id, "increment_id": increment_id}


def _add_increment(tx: Transaction, plan: BackupPlan, exports: Exports, size_mb: int) -> tuple[int, int]:
    stored = tx.get("image", plan.image_id or 0)
    image = Image(stored.element)
    _require_parent(tx, image, plan)
    increment = next_increment(image.increments, date=plan.date, size_mb=size_mb, source=plan.backup_id)
    changed = with_increment(image, increment, [disk.disk_id for disk in exports.disks])
    tx.update("image", image.id, stored.version, changed.element)
    return image.id, increment.id


def _require_parent(tx: Transaction, image: Image, plan: BackupPlan) -> None:
    """`Busy` unless the chain still ends with the parent, and that is good: a merge may have met damage."""
    last = image.increments[-1] if image.is_ready and image.increments else None
    row = next((row for row in tx.backups(image_id=image.id) if last and row.backup_id == last.source), None)
    if row is not None and row.state is BackupState.GOOD and row.increment_id + 1 == plan.increment_id:
        manifest = parse_manifest(row.manifest, what=f"backup {row.backup_id}")
        if plan.parent_id in (manifest.id, *manifest.stands_for):
            return
    raise Busy(f"image {image.id}: backup {plan.parent_id} is damaged or gone: it cannot be continued")


def _add_image(
    context: Context, tx: Transaction, plan: BackupPlan, *, exports: Exports, vm: Vm, size_mb: int
) -> int:
    stored = tx.get("datastore", plan.datastore_id)
    datastore = Datastore(stored.element)
    others = [Image(entry.element) for entry in tx.find("image", vm_id=vm.id)]
    is_first = all(image.datastore_id != datastore.id for image in others)
    taken = {image.element.findtext("NAME", "") for image in others}
    first: Increment | None = None
    if plan.checkpoint:
        first = next_increment((), date=plan.date, size_mb=size_mb, source=plan.backup_id)
    element = tx.create(
        "image",
        lambda image_id: (
            new_image(
                image_id,
                vm=vm,
                datastore=datastore,
                name=image_name(vm.id, plan.date, taken),
                source=plan.backup_id,
                date=plan.date,
                size_mb=size_mb,
                disk_ids=[disk.disk_id for disk in exports.disks],
                increment=first,
                image_format=context.facts["format"],
            ).element
        ),
    )
    image_id = Image(element).id
    kept = datastores.in_store(datastore, context.facts.get("store_id", ""))
    tx.update("datastore", datastore.id, stored.version, datastores.with_image(kept, image_id).element)
    if is_first and (left := _left_behind(tx, plan)):
        tx.change("image", image_id, lambda old: with_to_remove(Image(old), left).element)
    return image_id


def _left_behind(tx: Transaction, plan: BackupPlan) -> list[str]:
    """Backups that failed before there was an image to note them in, and that could not be discarded."""
    left = []
    for operation in tx.journal.list(kind="backup", vm_id=plan.vm_id):
        steps = tx.journal.steps(operation.id)
        stored = {
            step.data.get("attempt")
            for step in steps
            if step.name == "STORE" and step.state is not StepState.UNDONE
        }
        plans = [
            BackupPlan(**step.result["plan"])
            for step in steps
            if step.name == "PLAN" and step.data.get("attempt") in stored and "plan" in step.result
        ]
        left += [other.backup_id for other in plans if other.datastore_id == plan.datastore_id]
    known = {plan.backup_id, *(row.backup_id for row in tx.backups(vm_id=plan.vm_id))}
    return [backup_id for backup_id in left if backup_id not in known]


def parent_exports(store: Store, vm_id: int, backup_id: str) -> Exports | None:
    """The EXPORTS of a finished backup of a VM, from its manifest; None for no or an unknown backup."""
    found = recorded(store, backup_id, vm_id) if backup_id else None
    return None if found is None else exports_of_manifest(found)


def checkpoint_of(store: Store, vm_id: int, backup_id: str) -> str:
    """The checkpoint that a backup of a VM left behind, as it is recorded; empty for no backup."""
    found = recorded(store, backup_id, vm_id) if backup_id else None
    return "" if found is None else str(found.raw.get("checkpoint") or "")


def exports_of_manifest(manifest: Manifest) -> Exports:
    """What a manifest says of the exports that it was made of; no sockets, no files."""
    return Exports(
        disks=tuple(
            DiskExport(
                disk_id=disk.disk_id,
                target=disk.target,
                file=disk.file,
                type=BackupType(disk.type),
                reason=Reason(disk.reason),
                size_bytes=disk.size_bytes,
                format=disk.format,
                source=disk.source,
                source_id=disk.source_id,
                sample=disk.sample,
                backing=disk.backing,
                text=disk.text,
            )
            for disk in manifest.disks
        ),
        increment_id=manifest.increment_id,
        checkpoint=str(manifest.raw.get("checkpoint") or ""),
    )
