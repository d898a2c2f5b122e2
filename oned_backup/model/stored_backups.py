"""Which of the backups that a store has count, decided from their manifests alone.

Where a store has a merged backup beside what went into it, the merged one counts,
and the others are named as left over: whoever merged did not get to removing them.
Unless the catalogue has those: then the merged one is left over, or not done yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

from oned_backup.model.backup_config import FsFreeze
from oned_backup.model.manifest import Manifest

#: a backup's manifest, and its text
Entry: TypeAlias = tuple[Manifest, str]


def without_replaced(
    entries: Sequence[Entry], known: Collection[str], given_up: Collection[str] = ()
) -> tuple[list[Entry], list[str]]:
    """The backups that count, and what is said of those that are left over.

    `known`: the ids of the catalogue. What it has and the store too stays; else a merged backup wins
    over what it replaces. What is `given_up` would be removed under the feet of who brought it back.
    """
    known = set(known) & {manifest.id for manifest, _ in entries}
    undone = {m.id for m, _ in entries if m.id not in known and known & set(m.replaces)}
    replaced = {
        (manifest.vm_id, name): manifest
        for manifest, _ in entries
        if manifest.id not in undone
        for name in manifest.replaces
    }
    counting, left_over = [], []
    for manifest, text in entries:
        if manifest.id in undone:
            left_over.append(f"backup {manifest.id}: the catalogue has what was merged into it")
        elif (into := replaced.get((manifest.vm_id, manifest.id))) and manifest.id not in known:
            left_over.append(f"backup {manifest.id}: merged into {into.id}")
        elif manifest.id in given_up and manifest.id not in known:
            left_over.append(f"backup {manifest.id}: it is to be removed")
        else:
            counting.append((manifest, text))
    return counting, left_over


def chain_of(manifest: Manifest, merged: Mapping[tuple[int, str], Manifest]) -> str:
    """The chain that a backup belongs to.

    A backup names the chain by the one that began it when it was made, which may have been merged since.
    `merged`: the merged backups, by VM and by their own ids and those of what they replace.
    """
    vm_id, chain_id, seen = manifest.vm_id, manifest.chain_id, {""}
    while (vm_id, chain_id) in merged and chain_id not in seen:
        seen.add(chain_id)
        chain_id = merged[vm_id, chain_id].chain_id
    return chain_id


def one_of_each(entries: Sequence[Entry], known: Collection[str]) -> tuple[list[Entry], list[str]]:
    """The chain with one backup of each increment id, and what is said of the others.

    There are two where a backup failed, but could not be taken back from the store before the
    next one. That one counts which is known, or continued, or the newer.
    """
    parents = {disk.parent_id for manifest, _ in entries for disk in manifest.disks}
    chosen: dict[int, Entry] = {}
    doubles = []

    def weight(entry: Entry) -> tuple[bool, bool, int]:
        manifest = entry[0]
        return manifest.id in known, bool(parents & {manifest.id, *manifest.stands_for}), manifest.date

    for entry in sorted(entries, key=weight):
        older = chosen.get(entry[0].increment_id)
        if older is not None:
            doubles.append(f"backup {older[0].id}: increment {entry[0].increment_id} is {entry[0].id}")
        chosen[entry[0].increment_id] = entry
    return [chosen[number] for number in sorted(chosen)], doubles


def last_freezes(manifests: Iterable[Manifest]) -> dict[str, FsFreeze]:
    """How each VM, by its UUID, was frozen when it was last: what the store knows of its FS_FREEZE."""
    return {
        manifest.vm_uuid: FsFreeze(method)
        for manifest in sorted(manifests, key=lambda entry: entry.date)
        if (method := manifest.raw.get("freeze", {}).get("method")) in {FsFreeze.AGENT, FsFreeze.SUSPEND}
    }
