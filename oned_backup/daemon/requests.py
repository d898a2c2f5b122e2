"""What users may ask for: checked, and queued as operations with the right lock and host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from oned_backup.contract.targets import checked_format
from oned_backup.contract.url import parse_url
from oned_backup.daemon.service import Service
from oned_backup.errors import Conflict, InvalidInput, NotFound, NothingToBackUp, OnedBackupError
from oned_backup.model.image import Image, ImageState
from oned_backup.model.pruning import with_pin
from oned_backup.model.selection import refuse_without_disks
from oned_backup.model.vm import Vm, VmState, without_error
from oned_backup.operations import prune as pruning
from oned_backup.operations import scrub as scrubbing
from oned_backup.operations.caller import query_caller
from oned_backup.operations.delete import refuse_pinned
from oned_backup.operations.exclusion import datastore_lock, must_wait_for, retention_lock, vm_lock
from oned_backup.operations.flatten import checked_run
from oned_backup.operations.moving import refreshed
from oned_backup.operations.services import Services
from oned_backup.operations.stored import datastore_of_url, increment_option
from oned_backup.store import Operation, OperationState


def backup(
    service: Service, vm_id: int, *, datastore_id: int | None = None, reset: bool = False
) -> Operation:
    """Queue a backup of a VM; `Conflict` if one is queued or running, `NothingToBackUp` without disks."""
    vm = _placed(service, vm_id)
    _refuse_without_disks(service.services, vm)
    if datastore_id is not None:
        service.services.datastore(datastore_id)
    other = _backup_of(service, vm_id)
    if other is not None:
        raise Conflict(
            f"could not create a new backup for VM {vm_id}: {other.id} is {other.state}{_after(other)}",
            hint=f"Follow it with `oned-backup operation show {other.id} --wait`,"
            f" or end it with `oned-backup vm backup-cancel {vm_id}`.",
        )
    arguments: dict[str, Any] = {"vm_id": vm_id, "host_id": vm.host_id, "reset": reset}
    if datastore_id is not None:
        arguments["datastore_id"] = datastore_id
    return service.submit("backup", vm_lock(vm_id), arguments, vm_id=vm_id, datastore_id=datastore_id)


def _after(operation: Operation) -> str:
    """Of one that waits to be tried again: why."""
    return f", to try again after: {json.loads(operation.error)['message']}" if operation.error else ""


def _refuse_without_disks(services: Services, vm: Vm) -> None:
    """`NothingToBackUp` if the VM has no disk to back up, now either: only then its host is asked."""
    try:
        refuse_without_disks(vm)
    except NothingToBackUp:
        try:
            vm, _, _ = refreshed(services, query_caller(services, "backup"), vm)
        except OnedBackupError:
            return  # the backup itself tells what is wrong, and waits for a host that does not answer
        services.store.change("vm", vm.id, lambda element: without_error(Vm(element)).element)
        refuse_without_disks(vm)


def cancel_backup(service: Service, vm_id: int) -> Operation:
    """Ask for the end of the VM's backup; `Conflict` if there is none."""
    service.services.vm(vm_id)
    running = _backup_of(service, vm_id)
    if running is None:
        raise Conflict(f"VM {vm_id}: no backup in progress")
    return service.cancel(running.id)


def untrack(service: Service, vm_id: int) -> Operation:
    """Queue the removal of our checkpoints and dirty bitmaps from a VM's disks; its chain ends."""
    vm = _placed(service, vm_id)
    arguments = {"vm_id": vm_id, "host_id": vm.host_id}
    return service.submit("untrack", vm_lock(vm_id), arguments, vm_id=vm_id)


def restore(service: Service, image_id: int, arguments: Mapping[str, Any]) -> Operation:
    """Queue a restore of an image to a directory, on the host where its domain is to be defined."""
    image = service.services.image(image_id)
    vm = service.services.vm(image.vm_id)
    checked_format(str(arguments.get("format", "qcow2")))
    increment_option(service.services, image, arguments.get("increment_id"))
    found: dict[str, Any] = {"image_id": image_id, **arguments}
    define_host_id = found.get("define_host_id")
    host_id = found.get("host_id", define_host_id)
    if define_host_id not in {None, host_id}:
        raise InvalidInput("a domain is defined on the host that gets its files: --host and --define differ")
    if host_id is not None:
        host = service.services.host(host_id)
        found |= {"host_id": host_id, "tm_mad": host.tm_mad}
    elif vm.tm_mad:
        found["tm_mad"] = vm.tm_mad
    return service.submit("restore", vm_lock(image.vm_id), found, vm_id=image.vm_id, image_id=image_id)


def delete(service: Service, image_id: int, *, force: bool = False) -> Operation:
    """Queue the removal of an image; `Conflict` while its VM is being backed up.

    `force`: forget it even if its store cannot remove it.
    """
    image = service.services.image(image_id)
    running = _backup_of(service, image.vm_id)
    if running is not None and image.state != ImageState.DELETE:
        raise Conflict(
            f"image {image_id}: active backup {running.id} on VM {image.vm_id}",
            hint="Wait till it is finished, or cancel it.",
        )
    arguments: dict[str, Any] = {"image_id": image_id} | ({"force": True} if force else {})
    return service.submit("delete", vm_lock(image.vm_id), arguments, vm_id=image.vm_id, image_id=image_id)


def delete_increment(service: Service, image_id: int, increment_id: int) -> Operation:
    """Queue the removal of one increment: it is merged into the next one; the newest is cut off.

    The only increment goes with its image. `Conflict` if it is pinned or damaged (unless it is the newest).
    """
    image = service.services.image(image_id)
    known = [increment.id for increment in image.increments]
    if known in ([], [increment_id]) and increment_id in {0, *known}:
        return delete(service, image_id)
    if increment_id not in known:
        raise NotFound(
            f"image {image_id} has no increment {increment_id}", hint=f"It has {', '.join(map(str, known))}."
        )
    refuse_pinned(image, [increment_id])
    vm_id = image.vm_id
    arguments: dict[str, Any] = {"vm_id": vm_id, "image_id": image_id}
    if increment_id == known[-1]:
        arguments["increment_ids"] = [increment_id]
        return service.submit("cut", vm_lock(vm_id), arguments, vm_id=vm_id, image_id=image_id)
    run = known[known.index(increment_id) :][:2]
    checked_run(image, run, {row.backup_id: row for row in service.services.store.backups(image_id=image_id)})
    arguments["increment_ids"] = run
    return service.submit("flatten", retention_lock(vm_id), arguments, vm_id=vm_id, image_id=image_id)


def retention(service: Service, vm_id: int) -> Operation:
    """Queue the retention of a VM's restore points."""
    service.services.vm(vm_id)
    return service.submit("retention", retention_lock(vm_id), {"vm_id": vm_id}, vm_id=vm_id)


def pin(service: Service, image_id: int, increment_id: int | None, *, pinned: bool) -> Image:
    """Keep a restore point (None: the newest) whatever the retention says, or no longer."""

    def edit(element: Any) -> Any:
        image = Image(element)
        newest = image.increments[-1].id if image.increments else 0
        return with_pin(image, newest if increment_id is None else increment_id, pin=pinned).element

    return Image(service.services.store.change("image", image_id, edit))


def verify(service: Service, image_id: int, arguments: Mapping[str, Any]) -> Operation:
    """Queue the verification of an image."""
    image = service.services.image(image_id)
    increment_option(service.services, image, arguments.get("increment_id"))
    return service.submit(
        "verify",
        vm_lock(image.vm_id),
        {"image_id": image_id, **arguments},
        vm_id=image.vm_id,
        image_id=image_id,
    )


def download(service: Service, arguments: Mapping[str, Any]) -> Operation:
    """Queue the download of a disk by its pseudo-URL."""
    url = parse_url(str(arguments["url"]))
    datastore_of_url(service.services, url.datastore_id, url.scheme)
    checked_format(str(arguments.get("format", "raw")))
    host_id = arguments.get("host_id")
    if host_id is not None:
        arguments = {**arguments, "tm_mad": service.services.host(host_id).tm_mad}
    vm_id = _vm_of_backup(service, url.backup_id)
    lock = datastore_lock(url.datastore_id) if vm_id is None else vm_lock(vm_id)
    return service.submit("download", lock, arguments, vm_id=vm_id, datastore_id=url.datastore_id)


def import_store(service: Service, datastore_id: int) -> Operation:
    """Queue the import of a store's backups into the catalogue."""
    service.services.datastore(datastore_id)
    arguments = {"datastore_id": datastore_id}
    return service.submit("import", datastore_lock(datastore_id), arguments, datastore_id=datastore_id)


def prune(service: Service, datastore_id: int) -> Operation:
    """Queue the freeing of what a store does not need any more; `Unsupported` if it frees that at once."""
    pruning.refuse_without_prune(service.services, service.services.datastore(datastore_id))
    operation = pruning.queue(service.services, datastore_id)
    service.look()
    return operation


def scrub(service: Service, datastore_id: int) -> Operation:
    """Queue the reading of what is due to be proved, within the day's budget; `Conflict` if that is 0."""
    datastore = service.services.datastore(datastore_id)
    if not scrubbing.budget_bytes(service.services, datastore):
        raise Conflict(
            f"datastore {datastore_id} ({datastore.name}): its budget for scrubbing is 0",
            hint="Set its SCRUB_GB_PER_DAY, or read one image with `oned-backup image verify IMAGE`.",
        )
    operation = scrubbing.queue(service.services, datastore_id)
    service.look()
    return operation


def waits_for(service: Service, operation: Operation) -> Operation | None:
    """The running operation that a queued one must wait for, None if it waits for a worker only."""
    if operation.state is not OperationState.QUEUED:
        return None
    running = service.services.store.journal.list(state=OperationState.RUNNING)
    same_lock = next((other for other in running if other.lock == operation.lock), None)
    return same_lock or must_wait_for(operation, running)


def _placed(service: Service, vm_id: int) -> Vm:
    vm = service.services.vm(vm_id)
    if vm.state == VmState.DONE or vm.host_id < 0:
        raise Conflict(
            f"VM {vm_id} ({vm.name}) is on no host", hint="Import its domain with `oned-backup vm import`."
        )
    return vm


def _backup_of(service: Service, vm_id: int) -> Operation | None:
    for state in (OperationState.RUNNING, OperationState.QUEUED):
        found = service.services.store.journal.list(state=state, kind="backup", vm_id=vm_id, limit=1)
        if found:
            return found[0]
    return None


def _vm_of_backup(service: Service, backup_id: str) -> int | None:
    try:
        return service.services.store.backup(backup_id).vm_id
    except NotFound:
        return None
