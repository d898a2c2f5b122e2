"""What a datastore driver's reading actions share: which backup is meant, and the chain behind a disk.

Everything is taken from the manifests in the store, so that it works for a
store whose catalogue is lost. `Load` gives the manifest of a backup id, or
raises `NotFound`, `DataCorrupt` or `Unavailable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from oned_backup import xmldoc
from oned_backup.contract.documents import StoredDisk
from oned_backup.contract.exports import BackupType
from oned_backup.contract.url import DiskUrl
from oned_backup.errors import DataCorrupt, InvalidInput, NotFound
from oned_backup.model.increments import Increment, chain_to
from oned_backup.model.manifest import Manifest
from oned_backup.model.names import checked_name
from oned_backup.sdk.call import Call

Load: TypeAlias = Callable[[str], Manifest]


def wanted_backup(call: Call) -> str:
    """The id of the backup that IMAGE and the option INCREMENT_ID mean; the newest without the option."""
    image = _image(call)
    chain = _increments(image)
    wanted = call.integer_option("INCREMENT_ID")
    if not chain and not wanted:
        return checked_name(xmldoc.text(image, "SOURCE"), "IMAGE/SOURCE")
    return checked_name(chain_to(chain, wanted)[-1].source, "INCREMENT/SOURCE")


def meant_backups(call: Call) -> tuple[str, ...]:
    """The ids in the option BACKUP_IDS (comma-separated), else all of IMAGE, oldest first."""
    listed = call.option("BACKUP_IDS", "")
    if listed:
        ids = [part.strip() for part in listed.split(",") if part.strip()]
    else:
        image = _image(call)
        ids = [increment.source for increment in _increments(image)] or [xmldoc.text(image, "SOURCE")]
    return tuple(dict.fromkeys(checked_name(backup_id, "backup id") for backup_id in ids))


def disk_chain(load: Load, backup_id: str, disk_id: int) -> tuple[Manifest, ...]:
    """The backups that carry a disk's content at `backup_id`, from its last FULL file on, oldest first."""
    manifest = load(backup_id)
    disk = manifest.disk(disk_id)
    if disk is None:
        raise NotFound(f"backup {backup_id} has no disk {disk_id}")
    chain = [manifest]
    while disk.type != BackupType.FULL:
        child, parent_id = chain[-1].id, disk.parent_id
        if parent_id in {link.id for link in chain}:
            raise DataCorrupt(f"disk {disk_id}: backup {parent_id} continues itself")
        try:
            manifest = load(checked_name(parent_id, "parent id"))
        except (NotFound, InvalidInput) as error:
            raise DataCorrupt(
                f"disk {disk_id}: backup {child} continues {parent_id or 'nothing'}, which is not stored"
            ) from error
        disk = manifest.disk(disk_id)
        if disk is None:
            raise DataCorrupt(f"disk {disk_id}: backup {child} continues {parent_id}, which does not have it")
        chain.append(manifest)
    return tuple(reversed(chain))


def stored_disks(call: Call, scheme: str, load: Load, backup_id: str) -> tuple[StoredDisk, ...]:
    """The disks of a backup as they can be restored; only that of the option DISK_ID if it is given."""
    manifest = load(backup_id)
    only = call.integer_option("DISK_ID")
    if only is not None and manifest.disk(only) is None:
        raise NotFound(f"backup {backup_id} has no disk {only}")
    found = []
    for disk in manifest.disks:
        if only is None or disk.disk_id == only:
            chain = disk_chain(load, backup_id, disk.disk_id)
            url = DiskUrl(
                scheme=scheme,
                datastore_id=call.datastore_id,
                chain=tuple((link.increment_id, link.id) for link in chain),
                vm_id=manifest.vm_id,
                disk_id=disk.disk_id,
            )
            file = manifest.file(disk.file)
            found.append(
                StoredDisk(disk.disk_id, str(url), disk.size_bytes, disk.file, file.blake3 if file else "")
            )
    return tuple(found)


def url_chain(load: Load, url: DiskUrl) -> tuple[Manifest, ...]:
    """The backups that `url` names; `NotFound` if the store's manifests say otherwise."""
    chain = disk_chain(load, url.chain[-1][1], url.disk_id)
    if tuple(link.id for link in chain) != tuple(backup_id for _, backup_id in url.chain):
        known = ",".join(f"{link.increment_id}:{link.id}" for link in chain)
        raise NotFound(
            f"{url}: this chain is not in the store", hint=f"Disk {url.disk_id} is now restored from {known}."
        )
    return chain


def _image(call: Call) -> xmldoc.Element:
    if call.request.image is None:
        raise InvalidInput(f"request: {call.action} needs the section IMAGE")
    return call.request.image


def _increments(image: xmldoc.Element) -> list[Increment]:
    found = image.iterfind("BACKUP_INCREMENTS/INCREMENT")
    return sorted((Increment.from_element(element) for element in found), key=lambda increment: increment.id)
