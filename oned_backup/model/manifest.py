"""`manifest.json`: what a backup says about itself, so that it restores without any database.

    {"format": "oned-backup manifest", "version": 1, "blake3": "<of `backup`, canonical>",
     "backup": {"id", "chain_id", "parent_id", "increment_id", "type", "date", "installation",
                "checkpoint", "vm": {"id", "name", "uuid"}, "freeze": {…},
                "disks": [{"disk_id", "target", "type", "reason", "text", "file", "parent_id",
                           "size_bytes", "format", "source", "source_id", "sample",
                           "backing": […]}],
                "excluded": [{"disk_id", "target", "reason", "text"}],
                "files": [{"name", "size_bytes", "blake3", "hash_from", "uncompressed_bytes"}],
                "replaces": ["…"], "stands_for": ["…"]}}                 of merged ones only

The manifest is the last file of a backup to be written: a restore point exists
if and only if its manifest is durable. Canonical means UTF-8, sorted keys,
no white space. Unknown keys are kept.

`hash_from` and `uncompressed_bytes` are of compressed files only. Their digest
is of the bytes from that offset to the end and then of those before it: the
order in which they are written.

A merged backup (see `increment_flatten`) `replaces` all that went into it, and
`stands_for` those of them that had the same content: the newest, and what that
one stood for. Nothing stored is ever edited, so a backup may name a parent that
is gone: it continues the one that stands for it, and no other.

    merged from          replaces        stands_for
    m = a b c            a b c           c            d, whose parent is c, continues m
    n = m d              a b c m d       d
    o = f m (f is m's parent)  f a b c m     c m       d continues o
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blake3 import blake3

from oned_backup.errors import DataCorrupt, InvalidInput
from oned_backup.model.document import checked_title
from oned_backup.model.increments import BackupType
from oned_backup.model.names import checked_name

FORMAT = "oned-backup manifest"
VERSION = 1
FILE_NAME = "manifest.json"
_ALWAYS = {"name", "size_bytes", "blake3"}

#: more have no VM, disk or chain
_MOST_ID = (1 << 31) - 1
#: the end of the year 9999: no calendar here goes further
_LAST_DATE = 253_402_300_799


@dataclass(frozen=True)
class StoredFile:
    """A file of the backup and what it must hash to (64 hex digits).

    The digest is of the bytes from `hash_from` to the end, then of those before
    it. `uncompressed_bytes`: the size it would have; 0 if it is not compressed.
    """

    name: str
    size_bytes: int
    blake3: str
    hash_from: int = 0
    uncompressed_bytes: int = 0

    def to_json(self) -> dict[str, str | int]:
        """Its entry in the manifest."""
        return {name: value for name, value in asdict(self).items() if value or name in _ALWAYS}


@dataclass(frozen=True)
class ManifestDisk:
    """A disk in a backup. `parent_id`: the backup that an INCREMENT continues, else empty."""

    disk_id: int
    target: str
    type: str
    reason: str
    file: str
    parent_id: str
    size_bytes: int
    format: str = ""
    source: str = ""
    source_id: str = ""
    #: some clusters of the disk: offset and digest
    sample: str = ""
    #: what lay below the source in its backing chain
    backing: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Manifest:
    """One backup. `raw` is the whole `backup` object, with whatever else it carries."""

    id: str
    chain_id: str
    parent_id: str
    increment_id: int
    type: str
    date: int
    vm_id: int
    vm_name: str
    vm_uuid: str
    disks: tuple[ManifestDisk, ...]
    files: tuple[StoredFile, ...]
    raw: Mapping[str, Any]
    #: of a merged backup: all that went into it, oldest first
    replaces: tuple[str, ...] = ()
    #: of a merged backup: those whose content it has, so that what continued them continues this one
    stands_for: tuple[str, ...] = ()

    def disk(self, disk_id: int) -> ManifestDisk | None:
        """The disk of that id, None where the backup does not hold it."""
        return next((disk for disk in self.disks if disk.disk_id == disk_id), None)

    def file(self, name: str) -> StoredFile | None:
        """The file of that name, None where there is none."""
        return next((file for file in self.files if file.name == name), None)

    @property
    def size_bytes(self) -> int:
        """What the backup takes in the store, without the manifest itself."""
        return sum(file.size_bytes for file in self.files)

    @property
    def size_mb(self) -> int:
        """The same in MB, rounded up."""
        return -(-self.size_bytes >> 20)


def dump_manifest(backup: Mapping[str, Any]) -> bytes:
    """The file's bytes for a `backup` object, sealed with its checksum."""
    return json.dumps(_sealed(backup), indent=1, ensure_ascii=False).encode() + b"\n"


def dump_on_one_line(backup: Mapping[str, Any]) -> str:
    """The same document on one line, as the answers of drivers and the catalogue carry it."""
    return json.dumps(_sealed(backup), separators=(",", ":"))


def parse_manifest(data: bytes | str, *, what: str = FILE_NAME) -> Manifest:
    """The typed form; `DataCorrupt` if the text is damaged, foreign or of a newer version."""
    try:
        document = json.loads(data)
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise DataCorrupt(f"{what}: format {document['format']!r} version {document['version']!r}")
        backup = document["backup"]
        if blake3(_canonical(backup)).hexdigest() != document["blake3"]:
            raise DataCorrupt(f"{what}: checksum does not match the content")
        return _typed(backup)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, InvalidInput) as error:
        raise DataCorrupt(f"{what}: not a manifest: {type(error).__name__} {error}") from error


def _check_shape(backup: object) -> None:
    """`TypeError` for what is shown as it is and is not of the form that it should have."""
    if not isinstance(backup, dict):
        raise TypeError("backup")
    excluded = backup.get("excluded", [])
    if not isinstance(backup.get("freeze", {}), dict) or not isinstance(excluded, list):
        raise TypeError("freeze or excluded")
    if not all(isinstance(entry, dict) for entry in excluded):
        raise TypeError("excluded")


def _typed(backup: Mapping[str, Any]) -> Manifest:
    _check_shape(backup)
    disks = tuple(
        ManifestDisk(
            disk_id=_count(disk["disk_id"], _MOST_ID),
            target=str(disk["target"]),
            type=BackupType(disk["type"]).value,
            reason=str(disk["reason"]),
            file=checked_name(disk["file"], "disk file"),
            parent_id=_parent(disk),
            size_bytes=_count(disk["size_bytes"]),
            format=str(disk.get("format", "")),
            source=str(disk.get("source", "")),
            source_id=str(disk.get("source_id", "")),
            sample=str(disk.get("sample", "")),
            backing=tuple(str(path) for path in disk.get("backing", ())),
            text=str(disk.get("text", "")),
        )
        for disk in backup["disks"]
    )
    files = tuple(
        StoredFile(
            checked_name(file["name"], "file"),
            _count(file["size_bytes"]),
            str(file["blake3"]),
            _count(file.get("hash_from", 0)),
            _count(file.get("uncompressed_bytes", 0)),
        )
        for file in backup["files"]
    )
    return Manifest(
        id=checked_name(backup["id"], "backup id"),
        chain_id=checked_name(backup["chain_id"], "chain id"),
        parent_id=_parent(backup),
        increment_id=_count(backup["increment_id"], _MOST_ID),
        type=BackupType(backup["type"]).value,
        date=_count(backup["date"], _LAST_DATE),
        vm_id=_count(backup["vm"]["id"], _MOST_ID),
        vm_name=checked_title(str(backup["vm"]["name"])),
        vm_uuid=str(backup["vm"]["uuid"]),
        disks=disks,
        files=files,
        raw=backup,
        replaces=tuple(checked_name(name, "replaced backup") for name in backup.get("replaces", ())),
        stands_for=tuple(checked_name(name, "replaced backup") for name in backup.get("stands_for", ())),
    )


def _parent(of: Mapping[str, Any]) -> str:
    """The backup that this one, or its disk, continues; empty for none."""
    parent = of.get("parent_id") or ""
    return checked_name(parent, "parent") if parent else ""


def _count(value: Any, most: int = (1 << 63) - 1) -> int:
    """A number or size, which is not negative."""
    found = int(value)
    if not 0 <= found <= most:
        raise ValueError(f"{found} is out of range")
    return found


def _sealed(backup: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "blake3": blake3(_canonical(backup)).hexdigest(),
        "backup": backup,
    }


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
