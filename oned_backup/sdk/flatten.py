"""Backups that follow each other, merged into one: its files as streams, for a store to keep like any other.

    def increment_flatten(self, call):
        …if a finished one of that id is there: answer again…
        with MergedFiles(call, load, open_layer, read_small) as files:
            …store them by the same code as a backup's…
        return flattened(call, load(call.backup.id))

The newest of them gives its date, checkpoint, number and small files; each of
its disks is merged from where its content begins, or else from the first of
them. Nothing that goes in is changed. What continued the newest continues the
result, which stands for it (see `model.manifest`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from oned_backup.errors import Conflict, DataCorrupt, InvalidInput
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest, ManifestDisk, StoredFile, dump_on_one_line
from oned_backup.model.names import checked_name
from oned_backup.sdk import restore_points
from oned_backup.sdk.files import BackupFile, BackupFiles
from oned_backup.sdk.restore_points import Load
from oned_backup.sdk.stored import small_files

if TYPE_CHECKING:
    from oned_backup.disk.chain import Layer
    from oned_backup.sdk.call import Answer, Call

#: a disk's file in a backup, as `sdk.stored.open_layer` gives it; the stack keeps it open
OpenLayer: TypeAlias = Callable[[ExitStack, Manifest, int], "Layer"]
#: the content of a small file of a backup, compared with its checksum
ReadSmall: TypeAlias = Callable[[Manifest, StoredFile], bytes]


@dataclass(frozen=True)
class MergedDisk:
    """A disk of the result: in the newest backup, in the oldest that it is merged from, and the chains.

    `merged`: the backups that it is merged from; `beneath`: what these continue; both oldest first.
    """

    newest: ManifestDisk
    oldest: ManifestDisk
    merged: tuple[Manifest, ...]
    beneath: tuple[Manifest, ...]


class MergedFiles(BackupFiles):
    """All files of the merged backup, the manifest last; see `BackupFiles`.

    `DataCorrupt`, here or while it is read, if something that goes in is damaged:
    then nothing may be kept. `NotFound` if a backup of MERGE_IDS is absent.
    """

    def __init__(self, call: Call, load: Load, open_layer: OpenLayer, read_small: ReadSmall) -> None:
        self._open_layer = open_layer
        self._read_small = read_small
        self._merged = merged_backups(call, load)
        self._disks = merged_disks(load, self._merged, restore_points.chain_ids(call))
        super().__init__(call)

    def _open(self) -> Iterator[BackupFile]:
        from oned_backup.disk.merge import open_merged  # noqa: PLC0415 - loads the data engine

        newest = self._merged[-1]
        for file in small_files(newest):
            yield self._small(file.name, self._read_small(newest, file))
        for disk in self._disks:
            layers, beneath = (
                [self._open_layer(self._stack, manifest, disk.newest.disk_id) for manifest in manifests]
                for manifests in (disk.merged, disk.beneath)
            )
            full = disk.oldest.type == BackupType.FULL
            yield from self._image(disk.newest.file, open_merged(layers, full=full, beneath=beneath))

    def _small(self, name: str, content: bytes) -> BackupFile:
        return BackupFile(name, len(content), lambda: [content], _advance=self._advance)

    def _manifest(self, stored: Sequence[StoredFile]) -> Mapping[str, Any]:
        return merged_manifest(self._call.backup.id, self._merged, self._disks, stored)


def merged_backups(call: Call, load: Load) -> tuple[Manifest, ...]:
    """The backups of the option MERGE_IDS; `InvalidInput` unless they follow each other in IMAGE."""
    ids = [checked_name(part.strip(), "MERGE_IDS") for part in call.option("MERGE_IDS").split(",")]
    chain = restore_points.chain_ids(call)
    if len(ids) < 2:
        raise InvalidInput(f"MERGE_IDS: {ids[0]} alone cannot be merged")
    if ids[0] not in chain or list(chain[(at := chain.index(ids[0])) : at + len(ids)]) != ids:
        raise InvalidInput(f"MERGE_IDS: {', '.join(ids)} do not follow each other in the image")
    if call.backup.id in chain:
        raise Conflict(f"backup {call.backup.id} is in the image already")
    manifests = tuple(load(backup_id) for backup_id in ids)
    for parent, child in pairwise(manifests):
        if child.parent_id not in {parent.id, *parent.stands_for}:
            raise DataCorrupt(
                f"{child.id}/{MANIFEST}: continues {child.parent_id or 'nothing'}, not {parent.id}"
            )
    return manifests


def merged_disks(load: Load, merged: Sequence[Manifest], known: Sequence[str]) -> tuple[MergedDisk, ...]:
    """How each disk of the newest of `merged` comes about; `known`: all backups of the image."""
    ids = {manifest.id for manifest in merged}
    found = []
    for disk in merged[-1].disks:
        chain = restore_points.disk_chain(load, merged[-1].id, disk.disk_id, known)
        begins = next(place for place, manifest in enumerate(chain) if manifest.id in ids)
        oldest = chain[begins].disk(disk.disk_id) or disk
        found.append(MergedDisk(disk, oldest, chain[begins:], chain[:begins]))
    return tuple(found)


def merged_manifest(
    backup_id: str, merged: Sequence[Manifest], disks: Sequence[MergedDisk], stored: Sequence[StoredFile]
) -> dict[str, Any]:
    """The `backup` object of the merged backup's manifest.json."""
    first, newest = merged[0], merged[-1]
    of_newest = {int(disk["disk_id"]): disk for disk in newest.raw["disks"]}
    return {
        **newest.raw,
        "id": backup_id,
        "chain_id": first.chain_id,
        "parent_id": first.parent_id,
        "type": first.type,
        "disks": [
            {
                **of_newest[disk.newest.disk_id],
                "type": disk.oldest.type,
                "reason": disk.oldest.reason,
                "text": disk.oldest.text,
                "parent_id": disk.oldest.parent_id,
            }
            for disk in disks
        ],
        "files": [file.to_json() for file in stored],
        "replaces": [name for manifest in merged for name in (*manifest.replaces, manifest.id)],
        "stands_for": [*newest.stands_for, newest.id],
    }


def flattened(call: Call, manifest: Manifest) -> Answer:
    """What `increment_flatten` answers about the merged backup, also when it is asked again.

    `Conflict` if a backup of that id is there, but merged from others.
    """
    ids = [part.strip() for part in call.option("MERGE_IDS").split(",")]
    if not set(ids) <= set(manifest.replaces) or ids[-1] != manifest.stands_for[-1]:
        raise Conflict(f"backup {manifest.id} is there, but was not merged from {', '.join(ids)}")
    chain = [
        f"{increment.id}:{manifest.id if increment.source == ids[-1] else increment.source}"
        for increment in restore_points.increments(call)
        if increment.source not in ids[:-1]
    ]
    return {
        "BACKUP_ID": manifest.id,
        "SIZE_MB": manifest.size_mb,
        "CHAIN": ",".join(chain),
        "MANIFEST": dump_on_one_line(manifest.raw),
    }
