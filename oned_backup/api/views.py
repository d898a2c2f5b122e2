"""What the API shows: documents, restore points and operations put together for people and scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from oned_backup import xmldoc
from oned_backup.daemon.progress import RunningStep
from oned_backup.daemon.requests import waits_for
from oned_backup.daemon.service import Service
from oned_backup.daemon.telling import name_of
from oned_backup.errors import DataCorrupt
from oned_backup.model.backup_config import BackupConfig
from oned_backup.model.datastore import Datastore, masked
from oned_backup.model.host import PATHS, Host
from oned_backup.model.image import Image, ImageState
from oned_backup.model.manifest import parse_manifest
from oned_backup.model.pruning import pinned
from oned_backup.model.rows import row as list_row
from oned_backup.model.selection import select_disks
from oned_backup.model.views import to_json
from oned_backup.model.vm import Vm
from oned_backup.operations.aftermath import aftermath_of
from oned_backup.store import NewestGood, Operation, OperationState, Points, RestorePoint, Step, Store

JSON = dict[str, Any]


def host_row(host: Host) -> JSON:
    """A host in a list."""
    return {
        "id": host.id,
        "name": host.name,
        "uri": host.uri,
        "state": host.state_name,
        "vmm": host.vm_mad,
        "tm": host.tm_mad,
        "vms": list(host.vm_ids),
        "error": host.error,
        "paths": {name: str(host.path(name)) for name in PATHS},
    }


def vm_rows(store: Store) -> list[JSON]:
    """The VMs in a list, each with its last good backup and when one was last proved."""
    points, newest = store.points_of_vms(), store.newest_good()
    return [_vm_row(row, points.get(row["id"]), newest.get(row["id"])) for row in store.rows("vm")]


def _vm_row(row: JSON, points: Points | None, newest: NewestGood | None) -> JSON:
    return {
        **row,
        "backups": points.points if points else 0,
        "last_backup": vars(newest) if newest else None,
        "last_verified_at": points.last_proved_at if points else None,
    }


def document(store: Store, kind: str, number: int) -> str:
    """A document as the catalogue has it, indented; secrets are ***."""
    element = store.get(kind, number).element
    return xmldoc.serialize(masked(Datastore(element)) if kind == "datastore" else element, pretty=True)


def vm_view(store: Store, vm: Vm) -> JSON:
    """A VM with its disks, each with whether it is backed up and why not, and its images."""
    included, excluded = select_disks(vm)
    disks = [(disk, True, "", "") for disk in included]
    disks += [(entry.disk, False, entry.reason.value, entry.text) for entry in excluded]
    config = vm.config
    return {
        **_vm_row(
            list_row("vm", vm.element),
            store.points_of_vms(vm.id).get(vm.id),
            store.newest_good(vm.id).get(vm.id),
        ),
        "config": _config_view(config),
        "chain": {"image_id": config.incremental_backup_id, "increment_id": config.last_increment_id}
        if config.has_chain
        else None,
        "disks": [
            {
                "disk_id": disk.disk_id,
                "target": disk.target,
                "type": disk.type,
                "format": disk.format,
                "size_mb": disk.size_mb,
                "source": disk.source,
                "included": is_included,
                "reason": reason,
                "text": text,
            }
            for disk, is_included, reason, text in sorted(disks, key=lambda entry: entry[0].disk_id)
        ],
        "images": image_rows(store, vm.id),
        "operations": [operation_row(entry) for entry in store.journal.list(vm_id=vm.id, limit=5)],
        "last_failure": _last_failure(store, vm.id),
        "document": to_json(vm.element),
    }


def _last_failure(store: Store, vm_id: int) -> JSON | None:
    """The last backup that failed, and whether a later one succeeded; None if none is known."""
    failed = store.journal.list(kind="backup", vm_id=vm_id, state=OperationState.FAILED, limit=1)
    if not failed:
        return None
    good = store.journal.list(kind="backup", vm_id=vm_id, state=OperationState.DONE, limit=1)
    later = bool(good) and good[0].queued_at > failed[0].queued_at
    return {**failed_row(store, failed[0]), "succeeded_since": later}


def _config_view(config: BackupConfig) -> JSON:
    """All settings together, wherever the document has them."""
    own = {str(child.tag): child.text for child in config.to_own_elements()}
    return dict(sorted({**to_json(config.to_element()), **own}.items()))


def datastore_row(datastore: Datastore) -> JSON:
    """A datastore in a list."""
    return {
        "id": datastore.id,
        "name": datastore.name,
        "driver": datastore.ds_mad,
        "state": "READY" if datastore.is_enabled else "DISABLED",
        "total_mb": datastore.total_mb,
        "used_mb": datastore.used_mb,
        "free_mb": datastore.free_mb,
        "images": list(datastore.image_ids),
        "base_path": datastore.base_path,
        "error": datastore.disabled_reason,
    }


def datastore_view(datastore: Datastore) -> JSON:
    """A datastore with its parameters; secret ones are not shown."""
    shown = masked(datastore)
    return {
        **datastore_row(datastore),
        "parameters": {name: shown.findtext(f"TEMPLATE/{name}", "") for name in datastore.parameters},
        "document": to_json(shown),
    }


def image_rows(store: Store, vm_id: int | None = None) -> list[JSON]:
    """The images, of one VM or all, in a list."""
    points = store.points_of_images(vm_id)
    rows = store.rows("image", **({} if vm_id is None else {"vm_id": vm_id}))
    if vm_id is None:
        names = {row["id"]: row["name"] for row in store.rows("vm")}
    else:
        names = {vm_id: name_of(store, "vm", vm_id)}
    return [_image_row(row, points.get(row["id"]), names.get(row["vm_id"], "")) for row in rows]


def _image_row(row: JSON, points: Points | None, vm_name: str) -> JSON:
    broken = points is not None and points.broken and row["state"] == ImageState.READY.name
    return {
        **row,
        "vm_name": vm_name,
        "state": "BROKEN" if broken else row["state"],
        "restore_points": points.points if points else 0,
        "newest_at": points.last_good_at if points else None,
        "verified_at": points.last_proved_at if points and not points.unproved else None,
    }


def image_view(store: Store, image: Image) -> JSON:
    """An image with every restore point: its disks with reason codes, freeze window, proof."""
    points = store.backups(image_id=image.id)
    sizes = {entry.source: entry.size_mb for entry in image.increments}
    parents = {entry.source: entry.parent_id for entry in image.increments}
    held = pinned(image)
    return {
        **_image_row(
            list_row("image", image.element),
            store.points_of_images(image.vm_id).get(image.id),
            name_of(store, "vm", image.vm_id),
        ),
        "disk_ids": list(image.disk_ids),
        "increments": [
            {
                **point_row(point),
                "parent_id": parents.get(point.backup_id, -1),
                "pinned": point.increment_id in held,
                "size_mb": sizes.get(point.backup_id, image.size_mb),
                **_manifest_view(point),
            }
            for point in points
        ],
        "document": to_json(image.element),
    }


def point_row(point: RestorePoint) -> JSON:
    """A restore point."""
    return {
        "backup_id": point.backup_id,
        "image_id": point.image_id,
        "increment_id": point.increment_id,
        "stored_at": point.stored_at,
        "verified_at": point.verified_at,
        "state": point.state.value,
        "failure": point.failure,
    }


def _manifest_view(point: RestorePoint) -> JSON:
    try:
        manifest = parse_manifest(point.manifest, what=f"backup {point.backup_id}")
    except DataCorrupt as error:
        return {
            "type": "",
            "date": point.stored_at,
            "disks": [],
            "excluded": [],
            "manifest_error": str(error),
        }
    stored = {file.name: file for file in manifest.files}
    return {
        "type": manifest.type,
        "date": manifest.date,
        "freeze": manifest.raw.get("freeze", {}),
        "disks": [
            {
                "disk_id": disk.disk_id,
                "target": disk.target,
                "type": disk.type,
                "reason": disk.reason,
                "text": disk.text,
                "size_bytes": disk.size_bytes,
                "stored_bytes": stored[disk.file].size_bytes if disk.file in stored else 0,
                "uncompressed_bytes": stored[disk.file].uncompressed_bytes if disk.file in stored else 0,
            }
            for disk in manifest.disks
        ],
        "excluded": list(manifest.raw.get("excluded", [])),
    }


def operation_row(operation: Operation) -> JSON:
    """An operation in a list."""
    return {
        "id": operation.id,
        "kind": operation.kind,
        "state": operation.state.value,
        "cancel_requested": operation.cancel_requested,
        "vm_id": operation.vm_id,
        "image_id": operation.result.get("image_id", operation.image_id),
        "datastore_id": operation.datastore_id,
        "queued_at": operation.queued_at,
        "started_at": operation.started_at,
        "ended_at": operation.ended_at,
        "not_before": operation.not_before,
        "error": json.loads(operation.error) if operation.error else None,
    }


def failed_row(store: Store, operation: Operation) -> JSON:
    """An operation in a list, with the name of its VM and what is to be told of it if it failed."""
    return {
        **operation_row(operation),
        "vm_name": _vm_name(store, operation),
        "failure": _failure_view(operation, store.journal.steps(operation.id)),
    }


def _vm_name(store: Store, operation: Operation) -> str:
    return "" if operation.vm_id is None else name_of(store, "vm", operation.vm_id)


def _failure_view(operation: Operation, steps: Sequence[Step]) -> JSON | None:
    failure = aftermath_of(operation, steps)
    return None if failure is None else asdict(failure)


def operation_view(
    service: Service, operation: Operation, *, version: int = 0, steps: Sequence[Step] | None = None
) -> JSON:
    """An operation with its result and how far it is; `version` is what to pass when waiting for more."""
    blocker = waits_for(service, operation)
    view: JSON = {
        **operation_row(operation),
        "vm_name": _vm_name(service.services.store, operation),
        "arguments": dict(operation.arguments),
        "result": dict(operation.result),
        "waits_for": None if blocker is None else operation_row(blocker),
        "progress": _progress_view(service.board.get(operation.id)),
        "version": version,
    }
    if steps is not None:
        view["steps"] = [_step_view(step) for step in steps]
        view["failure"] = _failure_view(operation, steps)
    return view


def _progress_view(progress: RunningStep | None) -> JSON | None:
    if progress is None:
        return None
    return {
        "step": progress.step,
        "done_bytes": progress.done,
        "total_bytes": progress.total,
        "since": progress.since,
        "message": progress.message,
        "log": list(progress.lines),
    }


def _step_view(step: Step) -> JSON:
    return {
        "number": step.number,
        "name": step.name,
        "state": step.state.value,
        "attempt": step.data.get("attempt", 1),
        "undoes": step.data.get("undoes"),
        "started_at": step.started_at,
        "ended_at": step.ended_at,
    }
