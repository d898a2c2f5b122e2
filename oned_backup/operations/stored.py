"""Asking a datastore's driver about what it keeps: the sections that such requests need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.documents import Catalogue, Listing, RestorePlan
from oned_backup.contract.result import document
from oned_backup.errors import Conflict, DriverBug, InvalidInput, NotFound
from oned_backup.model.datastore import Datastore
from oned_backup.model.image import Image
from oned_backup.model.increments import chain_to
from oned_backup.model.manifest import Manifest, parse_manifest
from oned_backup.operations.caller import Caller
from oned_backup.operations.services import Services
from oned_backup.store import BackupState, Store


def manifest_of(services: Services, backup_id: str) -> Manifest:
    """The manifest of a restore point, as the catalogue has it, or of the one it was merged into."""
    found = recorded(services.store, backup_id)
    if found is None:
        raise NotFound(f"there is no backup {backup_id[:80]}")
    return found


def recorded(store: Store, backup_id: str, vm_id: int | None = None) -> Manifest | None:
    """The manifest of a backup, or of the one that stands for it since it was merged; None: unknown.

    `vm_id`: the VM that it is one of, if that is known.
    """
    with suppress(NotFound):
        return parse_manifest(store.backup(backup_id).manifest, what=f"backup {backup_id}")
    rows = store.backups(vm_id=vm_id)
    manifests = (parse_manifest(row.manifest, what=f"backup {row.backup_id}") for row in rows)
    return next((found for found in manifests if backup_id in (found.id, *found.stands_for)), None)


def sections_for(services: Services, image: Image) -> dict[str, Any]:
    """IMAGE and VM of a request about a stored image.

    The store knows the VM by the number that it had when the backup was made; after
    an import into another catalogue that may not be its number here.
    """
    vm_id = stored_vm_id(services, image)
    vm = xmldoc.copy(services.vm(image.vm_id).element)
    xmldoc.put(vm, "ID", vm_id)
    stored = xmldoc.copy(image.element)
    xmldoc.put(stored, "VMS", {"ID": vm_id})
    return {"image": stored, "vm": vm}


def stored_vm_id(services: Services, image: Image) -> int:
    """The VM's number in the store."""
    rows = services.store.backups(image_id=image.id)
    return parse_manifest(rows[0].manifest).vm_id if rows and rows[0].manifest else image.vm_id


def stored_manifest(services: Services, image: Image, increment_id: int | None) -> str:
    """The text of a restore point's manifest as the catalogue has it; None: of the newest."""
    source = chain_to(image.increments, increment_id)[-1].source if image.increments else image.source
    return services.store.backup(source).manifest


def catalogue_of(services: Services, backup_ids: Iterable[str]) -> Catalogue:
    """What the catalogue knows of these backups, for a store that has lost a manifest."""
    found = []
    for backup_id in backup_ids:
        with suppress(NotFound):
            found.append(services.store.backup(backup_id).manifest)
    return Catalogue(tuple(found))


def call_image(
    services: Services,
    caller: Caller,
    action: str,
    image: Image,
    options: Mapping[str, str],
    *,
    datastore: Datastore | None = None,
) -> dict[str, str]:
    """The answer of the driver of the datastore that keeps `image`; `datastore`: with other parameters."""
    place = datastore or services.datastore(image.datastore_id)
    rows = services.store.backups(image_id=image.id)
    catalogue = Catalogue(tuple(row.manifest for row in rows))
    return caller.datastore(
        action, place, options=options, catalogue=catalogue, **sections_for(services, image)
    )


def list_disks(
    services: Services,
    caller: Caller,
    image: Image,
    increment_id: int | None = None,
    *,
    datastore: Datastore | None = None,
) -> Listing:
    """The disks of a restore point with their pseudo-URLs; `datastore`: with other parameters."""
    options = increment_option(services, image, increment_id)
    answer = call_image(services, caller, "ls", image, options, datastore=datastore)
    return Listing.from_xml(document(answer, "LISTING"))


def plan_restore(
    services: Services,
    caller: Caller,
    image: Image,
    increment_id: int | None,
    disk_id: int | None,
    *,
    salvage: bool = False,
) -> RestorePlan:
    """What it takes to restore the VM, or one of its disks; to `salvage`, without what is damaged."""
    options = increment_option(services, image, increment_id) | ({"SALVAGE": "YES"} if salvage else {})
    if disk_id is not None:
        options["DISK_ID"] = str(disk_id)
    root = document(call_image(services, caller, "restore", image, options), "PLAN")
    try:
        return RestorePlan.from_xml(root)
    except InvalidInput as error:
        raise DriverBug(f"PLAN: {error}") from error


def increment_option(services: Services, image: Image, increment_id: int | None) -> dict[str, str]:
    """The option that names the increment; refuses those that cannot be restored."""
    if not image.is_ready:
        raise Conflict(f"image {image.id} is in state {image.state_name}: it cannot be read")
    if not image.increments:
        if increment_id not in {None, 0}:
            raise InvalidInput(f"image {image.id} holds one full backup: it has no increment {increment_id}")
        return {}
    wanted = chain_to(image.increments, increment_id)[-1]
    if services.store.backup(wanted.source).state is BackupState.REMOVING:
        raise Conflict(f"increment {wanted.id} of image {image.id} is being removed")
    return {"INCREMENT_ID": str(wanted.id)}


def datastore_of_url(services: Services, datastore_id: int, scheme: str) -> Datastore:
    """The datastore that a pseudo-URL names; `InvalidInput` if it is of another kind."""
    datastore = services.datastore(datastore_id)
    if datastore.ds_mad != scheme:
        raise InvalidInput(
            f"datastore {datastore_id} ({datastore.name}) has driver {datastore.ds_mad}, not {scheme}"
        )
    return datastore
