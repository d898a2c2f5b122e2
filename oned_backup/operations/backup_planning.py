"""PLAN of a backup: which chain and datastore, full or not, under which ids, and whether there is room."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from oned_backup.contract.actions import Kind
from oned_backup.contract.exports import Reason
from oned_backup.errors import Conflict, Misconfigured, NoSpace
from oned_backup.model.datastore import Datastore
from oned_backup.model.image import Image
from oned_backup.model.names import checkpoint_name
from oned_backup.model.selection import refuse_without_disks, select_disks
from oned_backup.model.vm import DomainState, Vm, VmState, backup_ended
from oned_backup.operations import datastores, record
from oned_backup.operations.backup_ids import new_backup_id
from oned_backup.operations.backup_plan import BackupPlan, live_name
from oned_backup.operations.chain import ChainPlan, last_good_parent, plan_chain, space_needed_mb
from oned_backup.operations.context import Context
from oned_backup.operations.moving import refreshed
from oned_backup.store import BackupState


def plan_backup(context: Context) -> Mapping[str, Any]:
    """The plan for the journal, made for the domain as it is now; a VM that was left in BACKUP is freed."""
    services = context.services
    vm_id = context.integer("vm_id")
    before = services.vm(vm_id)
    if before.in_backup:  # by an earlier attempt, or a daemon that died: the lock says it is ours
        before = Vm(services.store.change("vm", vm_id, lambda element: backup_ended(Vm(element)).element))
    chain = _choose_chain(context, before)
    context.caller.start_ahead(
        Kind.TM, before.tm_mad, live_name("pre_backup", live=before.state == VmState.ACTIVE)
    )
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(datastores.free_mb, services, chain.datastore_id, context.caller)
        vm, state, moved = refreshed(services, context.caller, before)
        free_mb = asked.result()
    if moved:
        context.note(moved)
    if state is DomainState.CRASHED:
        raise Conflict(
            f"VM {vm_id} ({vm.name}) has crashed and is kept as it is for inspection",
            hint="Stop or restart the domain, then back it up.",
        )
    refuse_without_disks(vm)
    with services.store.view() as view:
        images = [Image(view.get("image", image_id).element) for image_id in vm.backup_ids]
        datastore = Datastore(view.get("datastore", chain.datastore_id).element)
    decided = _decide(context, vm, chain, images, datastore, live=state is not DomainState.OFF)
    _check_room(vm, decided, images, datastore, free_mb)
    return {"plan": asdict(decided)}


def _choose_chain(context: Context, vm: Vm) -> ChainPlan:
    """Which chain and datastore; known from the catalogue alone."""
    services = context.services
    with services.store.view() as view:  # a merge may switch the catalogue meanwhile
        images = {image_id: Image(view.get("image", image_id).element) for image_id in vm.backup_ids}
        stores = [Datastore(entry.element) for entry in view.find("datastore")]
        good = {row.backup_id for row in view.backups(vm_id=vm.id, state=BackupState.GOOD)}
    chain = plan_chain(
        vm.config,
        images,
        good,
        enabled_datastores=[entry.id for entry in stores if entry.is_enabled],
        requested_datastore=context.arguments.get("datastore_id"),
        reset=bool(context.arguments.get("reset")),
    )
    if chain.explanation:
        context.note(chain.explanation)
    datastore = services.datastore(chain.datastore_id)
    if not datastore.is_enabled:
        reason = datastore.disabled_reason
        raise Misconfigured(
            f"datastore {datastore.id} ({datastore.name}) is disabled{f': {reason}' if reason else ''}",
            hint=f"Correct it with `oned-backup datastore update {datastore.id} KEY=VALUE`.",
        )
    return chain


def _decide(
    context: Context, vm: Vm, chain: ChainPlan, images: list[Image], datastore: Datastore, *, live: bool
) -> BackupPlan:
    services = context.services
    store = services.store
    driver = services.driver(Kind.DATASTORE, datastore.ds_mad)
    now = services.clock()
    backup_id = new_backup_id(now)
    parent = last_good_parent(vm.config, {image.id: image for image in images})
    tracked = chain.full_reason is not Reason.FULL_MODE
    return BackupPlan(
        vm_id=vm.id,
        live=live,
        transfer="stream" if "stream" in driver.manifest.features else "staged",
        datastore_id=chain.datastore_id,
        image_id=chain.image_id,
        backup_id=backup_id,
        parent_id=chain.parent_id,
        increment_id=chain.increment_id,
        date=int(now),
        checkpoint=checkpoint_name(store.installation, backup_id) if tracked else "",
        old_checkpoint=record.checkpoint_of(store, vm.id, parent),
        full_reason="" if chain.full_reason is None else chain.full_reason.value,
    )


def _check_room(vm: Vm, plan: BackupPlan, images: list[Image], datastore: Datastore, free_mb: int) -> None:
    """Refuse a backup that the datastore cannot take."""
    history: dict[str, int] = {}
    for image in images:
        sizes = [(entry.type.value, entry.size_mb) for entry in image.increments]
        for kind, size_mb in sizes or [("FULL", image.size_mb)]:
            history[kind] = max(history.get(kind, 0), size_mb)
    included, _ = select_disks(vm)
    sizes_mb = [disk.size_mb for disk in included]
    needed_mb = space_needed_mb(history, continues=plan.image_id is not None, sizes_mb=sizes_mb)
    if needed_mb > free_mb:
        raise NoSpace(
            f"datastore {datastore.id} ({datastore.name}): about {needed_mb} MB needed, {free_mb} MB free",
            hint="Delete backups, set KEEP_LAST or another rule of retention, or add space.",
        )
