"""What follows from damage in a store: restore points are BROKEN, and a chain that is hit is closed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from oned_backup.contract.documents import VerifiedBackup
from oned_backup.errors import DataCorrupt, NotFound
from oned_backup.model.image import Image
from oned_backup.model.manifest import Manifest, parse_manifest
from oned_backup.model.vm import Vm, with_config
from oned_backup.operations import stored
from oned_backup.operations.context import Context
from oned_backup.store import BackupState, Transaction


def broken_with(damaged: Collection[str], manifests: Sequence[Manifest]) -> tuple[str, ...]:
    """The ids of the `damaged` backups and of all that continue one of them, in the chain's order."""
    broken = set(damaged)
    stands_for = {name: manifest.id for manifest in manifests for name in manifest.stands_for}
    for manifest in manifests:
        parents = {disk.parent_id for disk in manifest.disks if disk.parent_id}
        if broken & {stands_for.get(name, name) for name in parents}:
            broken.add(manifest.id)
    return tuple(manifest.id for manifest in manifests if manifest.id in broken)


def mark_broken(tx: Transaction, image_id: int, damaged: Mapping[str, str]) -> tuple[tuple[str, ...], bool]:
    """Mark the `damaged` backups (what was found, by id) of an image and all that continue them.

    Returns the ids of all of them, and whether the VM's active chain ended by it.
    """
    manifests = [parse_manifest(row.manifest) for row in tx.backups(image_id=image_id)]
    broken = broken_with(damaged, manifests)
    for backup_id in broken:
        text = damaged.get(backup_id) or f"continues {next(iter(damaged))}, which is damaged"
        tx.mark_backup(backup_id, state=BackupState.BROKEN, failure=text)
    vm = Vm(tx.get("vm", Image(tx.get("image", image_id).element).vm_id).element)
    ends_chain = bool(broken) and vm.config.incremental_backup_id == image_id
    if ends_chain:
        tx.change("vm", vm.id, lambda element: with_config(Vm(element), vm.config.without_chain()).element)
    return broken, ends_chain


def record_verified(
    tx: Transaction, image_id: int, reports: Sequence[VerifiedBackup], *, whole: bool, now: float
) -> tuple[tuple[str, ...], bool]:
    """Enter what the store's driver found when it read backups of an image again; as `mark_broken` returns.

    `whole`: all of them was read, so what is sound is proved. What was merged, or is to be removed,
    since it was read does not count: its files may have gone meanwhile.
    """
    rows = {
        row.backup_id: row for row in tx.backups(image_id=image_id) if row.state is not BackupState.REMOVING
    }
    found = {report.backup_id for report in reports if report.backup_id in rows}
    damaged = {
        report.backup_id: report.failures_text
        for report in reports
        if report.failures and report.backup_id in found
    }
    broken, ends_chain = mark_broken(tx, image_id, damaged)
    if whole:
        manifests = [parse_manifest(row.manifest) for row in rows.values()]
        known_bad = {row.backup_id for row in rows.values() if row.state is BackupState.BROKEN}
        still_bad = set(broken_with(sorted((known_bad - found) | damaged.keys()), manifests))
        for backup_id in found - still_bad:
            tx.mark_backup(backup_id, state=BackupState.GOOD, verified_at=now, failure="")
    return broken, ends_chain


def enter_absence(context: Context, image: Image) -> bool:
    """Whether increments of `image` are not in its store, or lack others there; they are marked as broken.

    Each is looked for: a store that was brought back from an older copy lacks several.
    """
    absent: dict[str, str] = {}
    for increment in context.services.image(image.id).increments:
        try:
            stored.list_disks(context.services, context.caller, image, increment.id)
        except (NotFound, DataCorrupt) as error:
            absent[increment.source] = str(error)
    if not absent:
        return False
    with context.services.store.transaction() as tx:
        known = {row.backup_id for row in tx.backups(image_id=image.id)}
        broken, _ = mark_broken(tx, image.id, {name: text for name, text in absent.items() if name in known})
    context.note(f"not in the store, and marked as BROKEN: {', '.join(broken)}")
    return bool(broken)


def note_closed_chain(context: Context) -> None:
    """Tell that damage has ended the VM's active chain."""
    context.note("the damaged chain is closed: the next backup starts a new one")


def found_while_reading(context: Context, backup_id: str, text: str) -> None:
    """Enter damage that showed when a restore point was read for other reasons than to verify it.

    `text` says what is damaged: the backups of which it names a file, as a driver must, and what continues
    them. If it names none, it is the restore point itself. There may be more damage: nothing of the image
    counts as proved any more, so that scrubbing reads all of it soon.
    """
    with context.services.store.transaction() as tx:
        try:
            row = tx.backup(backup_id)
        except NotFound:  # a store's backup that the catalogue does not know
            return
        states = {one.backup_id: one.state for one in tx.backups(image_id=row.image_id)}
        damaged = named_in(text, states) or (backup_id,)
        new = [name for name in damaged if states[name] is BackupState.GOOD]
        if not new:
            return
        broken, ends_chain = mark_broken(tx, row.image_id, dict.fromkeys(new, text))
        tx.void_proofs(row.image_id)
    context.note(f"marked as BROKEN: {', '.join(broken)}; `oned-backup image verify` finds all damage")
    if ends_chain:
        note_closed_chain(context)


def named_in(text: str, backup_ids: Iterable[str]) -> tuple[str, ...]:
    """Those of `backup_ids` of which `text` names a file: `BACKUP/FILE`, also at the end of a path."""
    return tuple(name for name in backup_ids if re.search(rf"(?<![A-Za-z0-9._:,-]){re.escape(name)}/", text))
