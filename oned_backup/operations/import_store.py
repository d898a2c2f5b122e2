"""IMPORT: the catalogue's entries for what a store holds, made from the store alone.

Idempotent: backups that are known are left as they are. A VM is recognised by its
UUID; one that is nowhere known gets a document in state DONE, as OpenNebula has
for VMs that are gone, so that its backups can be listed and restored. Chains
are imported as they are and not continued: the next backup of an imported VM
starts a new one (the checkpoints belong to the installation that made them).

A copy of a store whose backups the catalogue has elsewhere is not imported: each backup is in one datastore.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.documents import Catalogue
from oned_backup.contract.exports import Reason
from oned_backup.contract.result import document
from oned_backup.errors import DataCorrupt, Unsupported
from oned_backup.model.backup_config import BackupConfig, FsFreeze, Mode
from oned_backup.model.datastore import Datastore, in_store, with_image
from oned_backup.model.document import Owner
from oned_backup.model.image import Image, image_name, new_image, with_increment
from oned_backup.model.increments import BackupType, Increment
from oned_backup.model.manifest import Manifest, parse_manifest
from oned_backup.model.pruning import to_remove
from oned_backup.model.stored_backups import Entry, chain_of, last_freezes, one_of_each, without_replaced
from oned_backup.model.vm import (
    DomainState,
    LcmState,
    Placement,
    Vm,
    VmState,
    new_vm,
    with_backup,
    with_state,
)
from oned_backup.operations.context import Context
from oned_backup.operations.engine import OperationKind, result_of
from oned_backup.operations.steps import Step
from oned_backup.store import BackupState, RestorePoint, Transaction

#: the kinds of operations that change what lies in a store
_CHANGING = frozenset({"backup", "delete", "cut", "retention", "flatten", "remove"})


def _read(context: Context) -> Mapping[str, Any]:
    services = context.services
    datastore = services.datastore(context.integer("datastore_id"))
    driver = services.driver(Kind.DATASTORE, datastore.ds_mad)
    if not driver.supports("catalogue"):
        raise Unsupported(f"driver {driver} cannot list a store: it has no action catalogue")
    answer = context.caller.datastore("catalogue", datastore)
    (context.work_dir / "catalogue.xml").write_text(answer["CATALOGUE"])
    return {"store_id": answer.get("STORE_ID", "")}


def _catalogue(context: Context) -> Catalogue:
    answer = {"CATALOGUE": (context.work_dir / "catalogue.xml").read_text()}
    return Catalogue.from_xml(document(answer, "CATALOGUE"))


def _import(context: Context, tx: Transaction) -> Mapping[str, Any]:
    catalogue = _catalogue(context)
    unreadable = [f"{name}: {text}" for name, text in catalogue.unreadable]
    kept_by = {row.backup_id: row.datastore_id for row in tx.backups()}
    known = set(kept_by)
    changing = _changing(context, tx)
    found: list[Entry] = []
    for text in catalogue.manifests:
        try:
            found.append((parse_manifest(text), text))
        except DataCorrupt as error:
            unreadable.append(str(error))
    counting, left_over = without_replaced(found, known, going(tx))
    chains: dict[tuple[int, str], list[Entry]] = defaultdict(list)
    merged = {(m.vm_id, name): m for m, _ in counting if m.replaces for name in (m.id, *m.replaces)}
    for entry in counting:
        chains[entry[0].vm_id, chain_of(entry[0], merged)].append(entry)
    freezes = last_freezes([manifest for manifest, _ in counting])
    counts = {"backups": 0, "images": 0, "vms": 0, "known": 0}
    for (_, chain_id), members in sorted(chains.items(), key=lambda item: item[1][0][0].date):
        entries, doubles = one_of_each(members, known)
        unreadable += doubles
        missing = [entry for entry in entries if entry[0].id not in known]
        counts["known"] += len(entries) - len(missing)
        others = {kept_by[m.id] for m, _ in entries if m.id in known} - {context.integer("datastore_id")}
        if others:
            unreadable.append(_copied(chain_id, min(others)))
            continue
        if not missing:
            continue
        if entries[0][0].vm_uuid in changing:
            unreadable.append(f"chain {chain_id}: its VM was backed up or its backups removed meanwhile")
            continue
        if entries[0][0].parent_id:
            unreadable.append(f"chain {chain_id}: its first backup is not in the store")
            continue
        counts["backups"] += len(missing)
        _import_chain(context, tx, entries, counts, known, freezes=freezes)
    for text in unreadable:
        context.note(f"not imported: {text}")
    for text in left_over:
        context.note(f"left over: {text}")
    return {**counts, "unreadable": unreadable, "left_over": left_over}


def _copied(chain_id: str, datastore_id: int) -> str:
    """What is said of a chain that the catalogue has in another datastore: a backup is in one of them."""
    return (
        f"chain {chain_id}: this is a copy of what datastore {datastore_id} keeps; if that is lost,"
        " forget its images with `oned-backup image delete --force` and import again"
    )


def _changing(context: Context, tx: Transaction) -> set[str]:
    """UUIDs of the VMs of which the store may have changed since it was read.

    What a backup has published but not recorded, or a removal has removed, must not be imported.
    """
    beside = tx.journal.overlapping(context.operation.started_at or 0.0, _CHANGING)
    ids = {other.vm_id for other in beside}
    return {row["uuid"] for row in tx.rows("vm") if row["id"] in ids}


def going(tx: Transaction) -> frozenset[str]:
    """The ids of the backups that the catalogue has given up, and that are still to go from a store."""
    return frozenset(name for entry in tx.find("image") for name in to_remove(Image(entry.element)))


def _import_chain(
    context: Context,
    tx: Transaction,
    entries: Sequence[Entry],
    counts: dict[str, int],
    known: set[str],
    *,
    freezes: Mapping[str, FsFreeze],
) -> None:
    datastore_id = context.integer("datastore_id")
    first = entries[0][0]
    vm = _vm_of(context, tx, entries[-1][0], counts, freezes)
    if first.id in known:
        image = Image(tx.get("image", tx.backup(first.id).image_id).element)
    else:
        image = _create_image(context, tx, vm, first)
        counts["images"] += 1
    present = {name for manifest, _ in entries for name in (manifest.id, *manifest.stands_for)}
    lost = {disk.parent_id for manifest, _ in entries for disk in manifest.disks} - present - {""}
    broken: set[str] = set()
    for manifest, text in entries:
        gap = (lost | broken) & {disk.parent_id for disk in manifest.disks}
        if gap:
            broken.update((manifest.id, *manifest.stands_for))
        if manifest.id in known:
            continue
        if manifest.id != first.id:
            image = _extend(tx, image, manifest)
        tx.add_backup(
            RestorePoint(
                backup_id=manifest.id,
                image_id=image.id,
                increment_id=manifest.increment_id,
                vm_id=vm.id,
                datastore_id=datastore_id,
                manifest=text,
                stored_at=manifest.date,
                state=BackupState.BROKEN if gap else BackupState.GOOD,
                failure=f"continues {min(gap)}, which is not in the store or broken" if gap else "",
            )
        )


def _create_image(context: Context, tx: Transaction, vm: Vm, first: Manifest) -> Image:
    datastore_id = context.integer("datastore_id")
    tracked = bool(first.raw.get("checkpoint"))
    datastore = Datastore(tx.get("datastore", datastore_id).element)
    taken = {entry.element.findtext("NAME", "") for entry in tx.find("image", vm_id=vm.id)}
    element = tx.create(
        "image",
        lambda image_id: (
            new_image(
                image_id,
                vm=vm,
                datastore=datastore,
                name=image_name(vm.id, first.date, taken),
                source=first.id,
                date=first.date,
                size_mb=first.size_mb,
                disk_ids=[disk.disk_id for disk in first.disks],
                increment=_increment(first, -1) if tracked else None,
                selected_disks=any(
                    disk.get("reason") == Reason.NOT_SELECTED for disk in first.raw.get("excluded", ())
                ),
            ).element
        ),
    )
    image = Image(element)
    kept = in_store(datastore, context.facts.get("store_id", ""))
    tx.change("datastore", datastore_id, lambda _old: with_image(kept, image.id).element)
    tx.change("vm", vm.id, lambda old: with_backup(Vm(old), image.id).element)
    return image


def _extend(tx: Transaction, image: Image, manifest: Manifest) -> Image:
    parent = image.increments[-1].id if image.increments else -1
    disk_ids = [disk.disk_id for disk in manifest.disks]
    changed = with_increment(image, _increment(manifest, parent), disk_ids)
    tx.change("image", image.id, lambda _old: changed.element)
    return changed


def _increment(manifest: Manifest, parent_id: int) -> Increment:
    return Increment(
        id=manifest.increment_id,
        parent_id=parent_id,
        date=manifest.date,
        size_mb=manifest.size_mb,
        source=manifest.id,
        type=BackupType(manifest.type),
    )


def _vm_of(
    context: Context,
    tx: Transaction,
    manifest: Manifest,
    counts: dict[str, int],
    freezes: Mapping[str, FsFreeze],
) -> Vm:
    """The catalogue's VM with the manifest's UUID; a new document in state DONE if there is none."""
    found = tx.find("vm", uuid=manifest.vm_uuid) if manifest.vm_uuid else []
    if found:
        return Vm(found[-1].element)
    domain = xmldoc.parse("<domain><devices/></domain>")
    domain.insert(0, xmldoc.build("name", manifest.vm_name))
    domain.insert(1, xmldoc.build("uuid", manifest.vm_uuid))
    element = tx.create(
        "vm",
        lambda vm_id: (
            with_state(
                new_vm(
                    vm_id,
                    name=manifest.vm_name,
                    placement=Placement(-1, ""),
                    domain=domain,
                    state=DomainState.OFF,
                    capacity_bytes={},
                    date=int(context.services.clock()),
                    owner=Owner(),
                    config=BackupConfig(
                        mode=Mode.INCREMENT, fs_freeze=freezes.get(manifest.vm_uuid, FsFreeze.NONE)
                    ),
                ),
                VmState.DONE,
                LcmState.INIT,
            ).element
        ),
    )
    counts["vms"] += 1
    return Vm(element)


IMPORT = OperationKind(
    name="import",
    steps=(Step("READ", do=_read), Step("RECORD", record=_import, commits=True)),
    result=result_of("backups", "images", "vms", "known", "unreadable", "left_over"),
)
