"""What a datastore driver's reading actions share: which backup is meant, and the chain behind a disk.

Everything is taken from the manifests in the store, so that it works for a
store whose catalogue is lost. `Load` gives the manifest of a backup id, or
raises `NotFound`, `DataCorrupt` or `Unavailable`; only one that is a `sdk.stored.Manifests`
also finds a backup that stands for another and that nobody has named.

A parent may have been merged into another backup that stands for it (see
`model.manifest`). Which of the two counts while both are stored is for the
catalogue to say: the one that IMAGE, or the URL, names. If only one is stored,
it is that one, whatever the catalogue says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import TypeAlias

from oned_backup import xmldoc
from oned_backup.contract.documents import StoredDisk
from oned_backup.contract.url import DiskUrl
from oned_backup.errors import Conflict, DataCorrupt, InvalidInput, NotFound
from oned_backup.model.increments import BackupType, Increment, chain_to
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest
from oned_backup.model.names import checked_name
from oned_backup.sdk.call import Call
from oned_backup.sdk.stored import Manifests

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
        ids = list(chain_ids(call)) or [xmldoc.text(_image(call), "SOURCE")]
    return tuple(dict.fromkeys(checked_name(backup_id, "backup id") for backup_id in ids))


def chain_ids(call: Call) -> tuple[str, ...]:
    """The ids of the backups in IMAGE, oldest first; none of an image without a chain."""
    return tuple(increment.source for increment in increments(call))


def increments(call: Call) -> tuple[Increment, ...]:
    """The increments in IMAGE, oldest first; none of an image without a chain."""
    return tuple(_increments(_image(call)))


def refuse_parents(manifests: Iterable[Manifest], ids: Collection[str]) -> None:
    """`Conflict` if a backup that stays needs one of `ids`, which are to go.

    `manifests`: of all finished backups of the VM. A parent that another backup stands for is
    not needed, if that one stays; and one of `ids` may be needed because it stands for a parent.
    """
    stored = tuple(manifests)
    staying = [manifest for manifest in stored if manifest.id not in ids]
    there = {name for manifest in staying for name in (manifest.id, *manifest.stands_for)}
    going = {backup_id: backup_id for backup_id in ids}
    for manifest in stored:
        if manifest.id in ids:
            going.update(dict.fromkeys(manifest.stands_for, manifest.id))
    for manifest in staying:
        for parent_id in sorted({manifest.parent_id, *(disk.parent_id for disk in manifest.disks)}):
            if parent_id in going and parent_id not in there:
                raise Conflict(
                    f"backup {going[parent_id]} cannot be removed: backup {manifest.id} continues it",
                    hint="Remove the whole chain, or the newer backups first.",
                )


def disk_chain(load: Load, backup_id: str, disk_id: int, known: Collection[str] = ()) -> tuple[Manifest, ...]:
    """The backups that carry a disk's content at `backup_id`, from its last FULL file on, oldest first.

    `known`: the backups that count, among which one may stand for a parent that is not.
    """
    manifest = load(backup_id)
    disk = manifest.disk(disk_id)
    if disk is None:
        raise _no_disk(manifest, disk_id)
    chain = [manifest]
    while disk.type != BackupType.FULL:
        child, parent_id = chain[-1].id, disk.parent_id
        try:
            manifest = _continued(load, checked_name(parent_id, "parent id"), known)
        except (NotFound, InvalidInput) as error:
            raise DataCorrupt(
                f"{child}/{MANIFEST}: disk {disk_id} continues {parent_id or 'nothing'}, which is not stored"
            ) from error
        if manifest.id in {link.id for link in chain}:
            raise DataCorrupt(f"{manifest.id}/{MANIFEST}: disk {disk_id} continues itself")
        disk = manifest.disk(disk_id)
        if disk is None:
            raise DataCorrupt(
                f"{child}/{MANIFEST}: disk {disk_id} continues {parent_id}, which does not have it"
            )
        chain.append(manifest)
    return tuple(reversed(chain))


def _no_disk(manifest: Manifest, disk_id: int) -> NotFound:
    there = ", ".join(f"{disk.disk_id} ({disk.target})" for disk in manifest.disks)
    return NotFound(f"backup {manifest.id} has no disk {disk_id}", hint=f"It has {there}.")


def stored_disks(call: Call, scheme: str, load: Load, backup_id: str) -> tuple[StoredDisk, ...]:
    """The disks of a backup as they can be restored; only that of the option DISK_ID if it is given."""
    manifest = load(backup_id)
    only = call.integer_option("DISK_ID")
    if only is not None and manifest.disk(only) is None:
        raise _no_disk(manifest, only)
    found = []
    for disk in manifest.disks:
        if only is None or disk.disk_id == only:
            chain = disk_chain(load, backup_id, disk.disk_id, chain_ids(call))
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
    """The backups that `url` names; `NotFound` if one is absent, or the store's manifests say otherwise.

    A URL of before a merge may name what was removed since: that is no damage.
    """
    ids = [backup_id for _, backup_id in url.chain]
    for backup_id in ids:
        load(checked_name(backup_id, "backup id"))
    chain = disk_chain(load, ids[-1], url.disk_id, ids)
    if tuple(link.id for link in chain) != tuple(backup_id for _, backup_id in url.chain):
        known = ",".join(f"{link.increment_id}:{link.id}" for link in chain)
        raise NotFound(
            f"{url}: this chain is not in the store", hint=f"Disk {url.disk_id} is now restored from {known}."
        )
    return chain


def _continued(load: Load, parent_id: str, known: Collection[str]) -> Manifest:
    """The backup that a child of `parent_id` continues: that one, or the one that stands for it."""
    if parent_id not in known:
        for backup_id in known:
            with suppress(NotFound, DataCorrupt):
                manifest = load(checked_name(backup_id, "backup id"))
                if parent_id in manifest.stands_for:
                    return manifest
    try:
        return load(parent_id)
    except NotFound:
        found = load.standing_for(parent_id) if isinstance(load, Manifests) else None
        if found is None:
            raise
        return found


def _image(call: Call) -> xmldoc.Element:
    if call.request.image is None:
        raise InvalidInput(f"request: {call.action} needs the section IMAGE")
    return call.request.image


def _increments(image: xmldoc.Element) -> list[Increment]:
    found = image.iterfind("BACKUP_INCREMENTS/INCREMENT")
    return sorted((Increment.from_element(element) for element in found), key=lambda increment: increment.id)
