"""FLATTEN: PLAN → MERGE → SWITCH; afterwards `remove` takes from the store what was merged.

    PLAN      the run of increments is there and good, there is room; the new backup's id is chosen
    MERGE     datastore: the merged backup is built beside the others and published   (undo: DISCARD)
    SWITCH    one transaction: the newest of the run names the merged backup, the others
              leave the chain and are noted as to be removed; `remove` is queued       commits

It has a lock of its own, so backups and restores of the VM go on meanwhile: a driver goes by the
chain that it is told, and both the old one and the new one are good while both are stored. A backup
that was made meanwhile continues the newest of the run under its old id; the merged one stands
for it. Restores that began before SWITCH are waited for by `remove` (see `exclusion`).

Damage never gets into a merged backup: it is entered as `verify` would enter it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Backup
from oned_backup.contract.result import whole_number
from oned_backup.errors import (
    Cancelled,
    Conflict,
    DataCorrupt,
    DriverBug,
    NoSpace,
    NotFound,
    OnedBackupError,
    Unsupported,
)
from oned_backup.model.image import Image
from oned_backup.model.increments import Increment
from oned_backup.model.manifest import Manifest, dump_on_one_line, parse_manifest
from oned_backup.model.names import job_repository
from oned_backup.model.pruning import run_of, with_merged
from oned_backup.model.retention import Merge
from oned_backup.model.vm import Vm, with_config
from oned_backup.operations import datastores, stored
from oned_backup.operations.backup_ids import NEW_ID, new_backup_id
from oned_backup.operations.context import Context
from oned_backup.operations.damage import mark_broken, note_closed_chain
from oned_backup.operations.delete import queue_removal, refuse_pinned, removed_later
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.retention import refuse_kept
from oned_backup.operations.steps import Step, Undo
from oned_backup.operations.verify import read_again
from oned_backup.store import BackupState, OperationState, RestorePoint, Transaction

_ACTION = "increment_flatten"


@dataclass(frozen=True)
class FlattenPlan:
    """What PLAN decided; it lies in the journal. `merge_ids`: the backups, oldest first."""

    vm_id: int
    image_id: int
    datastore_id: int
    increment_ids: tuple[int, ...]
    merge_ids: tuple[str, ...]
    backup_id: str
    date: int
    parent_id: str

    @property
    def increment_id(self) -> int:
        """The increment that the others are merged into."""
        return self.increment_ids[-1]


def _plan_of(context: Context) -> FlattenPlan:
    plan = context.facts["plan"]
    lists = {name: tuple(plan[name]) for name in ("increment_ids", "merge_ids")}
    return FlattenPlan(**{**plan, **lists})


def _plan(context: Context) -> Mapping[str, Any]:
    services = context.services
    image = services.image(context.integer("image_id"))
    increment_ids = tuple(int(number) for number in context.arguments["increment_ids"])
    rows = {row.backup_id: row for row in services.store.backups(image_id=image.id)}
    run = checked_run(image, increment_ids, rows)
    with services.store.transaction() as tx:
        _refuse_kept(context, tx, image, increment_ids)
    datastore = services.datastore(image.datastore_id)
    driver = services.driver(Kind.DATASTORE, datastore.ds_mad)
    if not driver.supports(_ACTION):
        raise Unsupported(f"driver {driver} cannot merge increments: it has no action {_ACTION}")
    _check_room(context, run, rows)
    services.store.change("vm", image.vm_id, lambda element: _flattening(element, active=True))
    first = parse_manifest(rows[run[0].source].manifest, what=run[0].source)
    plan = FlattenPlan(
        vm_id=image.vm_id,
        image_id=image.id,
        datastore_id=datastore.id,
        increment_ids=increment_ids,
        merge_ids=tuple(increment.source for increment in run),
        backup_id=new_backup_id(services.clock()),
        date=run[-1].date,
        parent_id=first.parent_id,
    )
    return {"plan": asdict(plan)}


def checked_run(
    image: Image, increment_ids: Sequence[int], rows: Mapping[str, RestorePoint]
) -> tuple[Increment, ...]:
    """The increments to merge; `Conflict` if one is absent, damaged, or pinned and not the newest.

    `rows`: the image's restore points by backup id. `Unsupported` for what OpenNebula's jobs keep together.
    """
    if job := job_repository(image.source):
        raise Unsupported(
            f"image {image.id} lies in OpenNebula's repository {job}: its increments cannot be merged",
            hint="Delete the image as a whole when it is not needed any more.",
        )
    if not image.is_ready:
        raise Conflict(f"image {image.id} is in state {image.state_name}: it cannot be changed")
    run = run_of(image, increment_ids)
    for increment in run:
        row = rows.get(increment.source)
        if row is None or row.state is not BackupState.GOOD:
            raise Conflict(
                f"increment {increment.id} of image {image.id} is damaged: what is damaged is not merged",
                hint="`oned-backup image verify` tells what is whole.",
            )
    refuse_pinned(image, increment_ids[:-1])
    return run


def _refuse_kept(context: Context, tx: Transaction, image: Image, increment_ids: Sequence[int]) -> None:
    """`Conflict` if the settings of retention asked for the merge, and do not any more."""
    if context.arguments.get("by_settings"):
        refuse_kept(context.services, tx, image.vm_id, Merge(image.id, tuple(increment_ids)))


def _check_room(context: Context, run: Sequence[Increment], rows: Mapping[str, RestorePoint]) -> None:
    """Refuse a merge that the datastore cannot take: it stands beside what goes in until that is removed."""
    services = context.services
    datastore = services.datastore(rows[run[0].source].datastore_id)
    newest = parse_manifest(rows[run[-1].source].manifest)
    virtual_mb = -(-sum(disk.size_bytes for disk in newest.disks) >> 20)
    needed_mb = max(1, min(sum(increment.size_mb for increment in run), virtual_mb))
    free_mb = datastores.free_mb(services, datastore.id, context.caller)
    if needed_mb > free_mb:
        raise NoSpace(
            f"datastore {datastore.id} ({datastore.name}): a merge takes up to {needed_mb} MB for a while,"
            f" {free_mb} MB free",
            hint="Add space, or delete the newest or whole images.",
        )


def _flattening(element: xmldoc.Element, *, active: bool) -> xmldoc.Element:
    vm = Vm(element)
    return with_config(vm, replace(vm.config, active_flatten=active)).element


def _sections(context: Context, plan: FlattenPlan) -> dict[str, Any]:
    image = context.services.image(plan.image_id)
    backup = Backup(
        id=plan.backup_id,
        chain_id=image.source,
        increment_id=plan.increment_id,
        date=plan.date,
        parent_id=plan.parent_id,
    )
    return {"backup": backup, **stored.sections_for(context.services, image)}


def _merge(context: Context) -> Mapping[str, Any]:
    plan = _plan_of(context)
    services = context.services
    try:
        answer = context.caller.datastore(
            _ACTION,
            services.datastore(plan.datastore_id),
            options={"MERGE_IDS": ",".join(plan.merge_ids), **NEW_ID},
            catalogue=stored.catalogue_of(services, plan.merge_ids),
            **_sections(context, plan),
        )
    except (DataCorrupt, NotFound) as damage:
        _enter_damage(context, plan, damage)
        raise
    finally:
        services.measured_at.pop(plan.datastore_id, None)  # what was measured is no longer true
    if answer["BACKUP_ID"] != plan.backup_id:
        raise DriverBug(f"{_ACTION}: BACKUP_ID is {answer['BACKUP_ID'][:64]}, not {plan.backup_id}")
    size_mb = whole_number(answer, "SIZE_MB")
    if f"{plan.increment_id}:{plan.backup_id}" not in answer["CHAIN"].split(","):
        raise DriverBug(f"{_ACTION}: CHAIN does not name {plan.backup_id}: {answer['CHAIN'][:200]}")
    return {"size_mb": size_mb, "manifest": _told(answer, plan) or _untold(context, plan)}


def _told(answer: Mapping[str, str], plan: FlattenPlan) -> str:
    """The manifest that the driver tells, checked; empty if it tells none."""
    text = answer.get("MANIFEST", "")
    if not text:
        return ""
    try:
        manifest = parse_manifest(text, what="MANIFEST")
    except DataCorrupt as error:
        raise DriverBug(f"{_ACTION}: {error}") from error
    right = (
        (manifest.id, manifest.increment_id) == (plan.backup_id, plan.increment_id)
        and set(plan.merge_ids) <= set(manifest.replaces)
        and plan.merge_ids[-1] in manifest.stands_for
    )
    if not right:
        raise DriverBug(f"{_ACTION}: MANIFEST is not that of {plan.backup_id}, merged from {plan.merge_ids}")
    return text


def _untold(context: Context, plan: FlattenPlan) -> str:
    """What the catalogue keeps if the driver tells no manifest: all but the stored files."""
    merged = [stored.manifest_of(context.services, backup_id) for backup_id in plan.merge_ids]
    first, newest = merged[0], merged[-1]
    disks = []
    for disk in newest.raw["disks"]:
        begins = _beginning(int(disk["disk_id"]), merged)
        disks.append({**disk, **{name: begins[name] for name in ("type", "reason", "parent_id")}})
    raw = {
        **newest.raw,
        "id": plan.backup_id,
        "chain_id": first.chain_id,
        "parent_id": first.parent_id,
        "type": first.type,
        "disks": disks,
        "files": [],
        "replaces": [name for manifest in merged for name in (*manifest.replaces, manifest.id)],
        "stands_for": [*newest.stands_for, newest.id],
    }
    return dump_on_one_line(raw)


def _beginning(disk_id: int, merged: Sequence[Manifest]) -> Mapping[str, Any]:
    """The oldest of `merged` manifests' entries for a disk that its content is merged from."""
    found: Mapping[str, Any] = {}
    for manifest in reversed(merged):
        entry = next((disk for disk in manifest.raw["disks"] if int(disk["disk_id"]) == disk_id), None)
        if entry is None:
            break
        found = entry
        if entry["type"] == "FULL":
            break
    return found


def _enter_damage(context: Context, plan: FlattenPlan, damage: OnedBackupError) -> None:
    """Find out which of the backups are damaged, and mark them and all that continue them."""
    failures: dict[str, str] = {}
    image = context.services.image(plan.image_id)
    try:
        for backup_id in plan.merge_ids:
            found = read_again(context.services, context.caller, image, backup_id, None)
            if found.failures:
                failures[backup_id] = found.failures_text
    except Cancelled:
        raise
    except OnedBackupError as error:
        context.note(f"it could not be found out which backup is damaged: {error}")
    if not failures and isinstance(damage, NotFound):
        return
    if not failures:  # read as a whole it is not what it was: at least this point cannot be proved
        failures = {plan.merge_ids[-1]: f"could not be proved by a merge: {damage}"}
    with context.services.store.transaction() as tx:
        broken, ends_chain = mark_broken(tx, plan.image_id, failures)
    context.note(f"marked as BROKEN: {', '.join(broken)}")
    if ends_chain:
        note_closed_chain(context)


def _discard(context: Context) -> None:
    """Undo of MERGE: nothing of the merged backup stays, finished or not. Nobody was told of it."""
    plan = _plan_of(context)
    datastore = context.services.datastore(plan.datastore_id)
    sections = _sections(context, plan)
    with removed_later(context, lambda: plan.image_id, plan.backup_id):
        context.caller.datastore("backup_cancel", datastore, **sections)
        context.caller.datastore("rm", datastore, **sections, options={"BACKUP_IDS": plan.backup_id})


def _switch(context: Context, tx: Transaction) -> Mapping[str, Any]:
    plan = _plan_of(context)
    image = Image(tx.get("image", plan.image_id).element)
    rows = {row.backup_id: row for row in tx.backups(image_id=image.id)}
    run = checked_run(image, plan.increment_ids, rows)
    if tuple(increment.source for increment in run) != plan.merge_ids:
        raise Conflict(f"image {image.id}: its chain was changed meanwhile")
    _refuse_kept(context, tx, image, plan.increment_ids)
    size_mb = int(context.facts["size_mb"])
    merged = with_merged(image, plan.increment_ids, source=plan.backup_id, size_mb=size_mb)
    tx.change("image", image.id, lambda _old: merged.element)
    newest = rows[plan.merge_ids[-1]]
    for backup_id in plan.merge_ids:
        tx.forget_backup(backup_id)
    # Not verified_at: what is stored now was written just now and not read again.
    tx.add_backup(
        replace(newest, backup_id=plan.backup_id, manifest=context.facts["manifest"], verified_at=None)
    )
    return {"remove": queue_removal(tx, image.vm_id, [image.id]).id}


def _result(context: Context) -> Mapping[str, Any]:
    plan = _plan_of(context)
    return {
        "image_id": plan.image_id,
        "increment_id": plan.increment_id,
        "merged": list(plan.increment_ids),
        "backup_id": plan.backup_id,
        **{name: context.facts[name] for name in ("size_mb", "remove") if name in context.facts},
    }


def _ended(context: Context, _state: OperationState, _error: OnedBackupError | None) -> None:
    vm_id = context.operation.vm_id
    if vm_id is not None:
        context.services.store.change("vm", vm_id, lambda element: _flattening(element, active=False))


FLATTEN = OperationKind(
    name="flatten",
    steps=(
        Step("PLAN", do=_plan),
        Step("MERGE", do=_merge, undo=Undo("DISCARD", _discard)),
        Step("SWITCH", record=_switch, commits=True),
    ),
    result=_result,
    ended=_ended,
    requeue=True,
)
