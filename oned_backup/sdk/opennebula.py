"""Backups that OpenNebula's drivers stored, seen as ours: manifests made up from what lies there.

    BASE_PATH/<vm id>/<6 hex digits>/        rsync; in restic_snapshots the last folder's name is another
        vm.xml                           OpenNebula's document of the VM, base64
        disk.<disk id>.<increment>       qcow2; increments name a backing file that is there no more
        disk.tpm.0                       perhaps

In a restic repository of a backup job (BASE_PATH/job_<job id>) lie the backups of several VMs; there
the id of a backup is `job_12.25f4b298`: the repository belongs to it.

There are no checksums: such a backup can be restored, and its images are checked for being
sound qcow2 files, but nothing proves their content. Nothing in it is trusted:
whether a file is full or an increment is taken from its header (where the name of the backing file
is not even read), which backup continues which from the numbers in the names and, where several
have the same number, from the time of the files; vm.xml only gives names, and only valid ones. A
backup that we have merged from such ones has a manifest, and is continued like the last of them.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.companions import VM_XML
from oned_backup.contract.exports import Reason
from oned_backup.errors import DataCorrupt, InvalidInput, NotFound, Unsupported
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest, StoredFile, dump_manifest, parse_manifest
from oned_backup.sdk.store_folder import StoreFolder

#: stands in a made-up manifest under `made_by`
MAKER = "opennebula"

#: of rsync, and the short ids of restic_snapshots
_ID = re.compile(r"(?:job_\d{1,9}\.)?[0-9a-f]{6}(?:[0-9a-f]{2})?", re.ASCII)
_DISK = re.compile(r"disk\.(\d{1,9})\.(\d{1,9})")
_MAX_VM_XML_BYTES = 16 << 20
_MAX_MANIFEST_BYTES = 64 << 20
_HEADER_BYTES = 64 << 10
_MAX_NAME = 128


def may_be_foreign(backup_id: str) -> bool:
    """Whether OpenNebula gives such names to backups; ours look different."""
    return _ID.fullmatch(backup_id) is not None


def is_made_up(manifest: Manifest) -> bool:
    """Whether the manifest was made here, for a backup without checksums."""
    return manifest.raw.get("made_by") == MAKER


def is_image(name: str) -> bool:
    """Whether OpenNebula gives such names to the images of disks."""
    return _DISK.fullmatch(name) is not None


def made_up_manifests(folder: StoreFolder) -> dict[str, Manifest | DataCorrupt]:
    """The manifests of all backups of OpenNebula's in a VM's folder; for a damaged one, what is wrong."""
    found: dict[str, _Found | DataCorrupt] = {}
    merged: list[Manifest] = []
    unclear = ""
    for name in folder.names():
        if name.startswith("."):
            continue
        try:
            with folder.folder(name) as stored:
                if may_be_foreign(name) and not stored.has(MANIFEST):
                    found[name] = _look(name, stored)
                elif is_made_up(manifest := _read_manifest(stored)):
                    merged.append(manifest)
        except DataCorrupt as error:
            if may_be_foreign(name):
                found[name] = error
            else:
                unclear = name
    manifests: dict[str, Manifest | DataCorrupt] = {
        name: error for name, error in found.items() if isinstance(error, DataCorrupt)
    }
    vm_id = int(folder.path.name)
    sound = [one for one in found.values() if isinstance(one, _Found)]
    for one in sorted(sound, key=lambda one: (one.number, one.date_ns)):
        try:
            if one.continues and unclear:  # it might be what this one continues
                raise DataCorrupt(f"backup {one.id}: what it continues is not known: {unclear} is damaged")
            manifests[one.id] = _manifest(vm_id, one, _continued(one, sound, manifests, merged))
        except DataCorrupt as error:
            manifests[one.id] = error
    return manifests


def plain_vm_xml(data: bytes) -> bytes:
    """The document in OpenNebula's vm.xml; `DataCorrupt` if it is none."""
    try:
        text = base64.b64decode(b"".join(data.split()), validate=True)
        xmldoc.parse(text, what=VM_XML)
    except (binascii.Error, InvalidInput) as error:
        raise DataCorrupt(f"{VM_XML}: not a document in base64: {error}") from error
    return text


@dataclass(frozen=True)
class _Image:
    disk_id: int
    file: str
    guest_bytes: int
    continues: bool


@dataclass(frozen=True)
class _Found:
    """A backup as it lies there. `number`: of the increment, by the names of its files."""

    id: str
    number: int
    date_ns: int
    images: tuple[_Image, ...]
    files: tuple[StoredFile, ...]
    vm_name: str
    vm_uuid: str

    @property
    def continues(self) -> bool:
        return any(image.continues for image in self.images)


def _look(backup_id: str, stored: StoreFolder) -> _Found:
    images, files, numbers, dates = [], [], set(), []
    for name in stored.names():
        descriptor = stored.open_file(name)
        with os.fdopen(descriptor, "rb", buffering=0) as opened:
            status = os.fstat(descriptor)
            files.append(StoredFile(name, status.st_size, ""))
            dates.append(status.st_mtime_ns)
            if match := _DISK.fullmatch(name):
                images.append(_image(int(match[1]), name, opened.read(_HEADER_BYTES), status.st_size))
                numbers.add(int(match[2]))
            elif name.startswith("disk.") and name != "disk.tpm.0":
                raise DataCorrupt(f"{stored.path / name}: only qcow2 images can be taken over")
    if not images:
        raise DataCorrupt(f"{stored.path} is no backup: it has no {MANIFEST} and no images")
    if len(numbers) > 1:
        raise DataCorrupt(f"{stored.path} has files of {len(numbers)} increments")
    vm_name, vm_uuid = _identity(stored)
    return _Found(backup_id, numbers.pop(), max(dates), tuple(images), tuple(files), vm_name, vm_uuid)


def _image(disk_id: int, name: str, start: bytes, file_bytes: int) -> _Image:
    from oned_backup.disk.qcow2 import parse_header  # noqa: PLC0415 - loads the data engine

    try:
        header = parse_header(start, file_bytes, name, foreign=True)
    except Unsupported as error:
        raise DataCorrupt(error.message) from error
    return _Image(disk_id, name, header.guest_bytes, header.names_backing)


def _identity(stored: StoreFolder) -> tuple[str, str]:
    """The VM's name and UUID, empty where vm.xml has no valid ones."""
    from uuid import UUID  # noqa: PLC0415 - brings much along, and few stores have such backups

    try:
        document = xmldoc.parse(plain_vm_xml(stored.read_file(VM_XML, _MAX_VM_XML_BYTES)), what=VM_XML)
        name = xmldoc.text(document, "NAME")[:_MAX_NAME]
        uuid = UUID(xmldoc.text(document, "TEMPLATE/OS/UUID"))
        return "".join(c for c in name if c.isprintable()), str(uuid)
    except (DataCorrupt, ValueError):
        return "", ""


def _read_manifest(stored: StoreFolder) -> Manifest:
    try:
        return parse_manifest(
            stored.read_file(MANIFEST, _MAX_MANIFEST_BYTES), what=str(stored.path / MANIFEST)
        )
    except NotFound as error:
        raise DataCorrupt(error.message) from error


def _continued(
    one: _Found,
    sound: list[_Found],
    manifests: Mapping[str, Manifest | DataCorrupt],
    merged: list[Manifest],
) -> Manifest | None:
    """The backup that an increment continues: the last one before it that has the number before its own.

    Of one that was merged and the merged one, it is the former while it is there.
    """
    if not one.continues:
        return None
    number = one.number - 1
    before = [(other.date_ns, other.id, manifests.get(other.id)) for other in sound if other.number == number]
    before += [
        (other.date * 10**9, "", other)
        for other in merged
        if other.increment_id == number and not {entry[1] for entry in before} & set(other.stands_for)
    ]
    if len(before) > 1:
        before = sorted((entry for entry in before if entry[0] < one.date_ns), key=lambda entry: entry[0])[
            -1:
        ]
    if not before:
        raise DataCorrupt(f"backup {one.id}: increment {number}, which it continues, is not stored")
    _, parent_id, parent = before[0]
    if not isinstance(parent, Manifest):
        raise DataCorrupt(f"backup {one.id}: continues {parent_id}, which is damaged")
    return parent


def _manifest(vm_id: int, one: _Found, parent: Manifest | None) -> Manifest:
    """Sealed and parsed as if it had been read."""
    backup: dict[str, Any] = {
        "id": one.id,
        "chain_id": parent.chain_id if parent else one.id,
        "parent_id": parent.id if parent else "",
        "increment_id": one.number,
        "type": (BackupType.INCREMENT if parent else BackupType.FULL).value,
        "date": one.date_ns // 10**9,
        "installation": "",
        "checkpoint": f"one-{vm_id}-{one.number}",
        "made_by": MAKER,
        "vm": {
            "id": vm_id,
            "name": one.vm_name or f"one-{vm_id}",
            "uuid": one.vm_uuid or _uuid_of(vm_id),
        },
        "disks": [_disk(image, parent) for image in sorted(one.images, key=lambda image: image.disk_id)],
        "excluded": [],
        "files": [file.to_json() for file in one.files],
    }
    return parse_manifest(dump_manifest(backup))


def _uuid_of(vm_id: int) -> str:
    from uuid import NAMESPACE_URL, uuid5  # noqa: PLC0415 - as above

    return str(uuid5(NAMESPACE_URL, f"opennebula-vm-{vm_id}"))


def _disk(image: _Image, parent: Manifest | None) -> dict[str, Any]:
    if image.continues and (parent is None or parent.disk(image.disk_id) is None):
        raise DataCorrupt(f"{image.file}: is an increment of a disk that the backup before does not have")
    return {
        "disk_id": image.disk_id,
        "target": "",
        "type": (BackupType.INCREMENT if image.continues else BackupType.FULL).value,
        "reason": (Reason.INCREMENT if image.continues else Reason.FULL_MODE).value,
        "text": "stored by OpenNebula",
        "file": image.file,
        "parent_id": parent.id if parent and image.continues else "",
        "size_bytes": image.guest_bytes,
        "format": "qcow2",
    }
