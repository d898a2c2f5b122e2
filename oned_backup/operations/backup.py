"""BACKUP: PLAN → PREPARE → STORE → RECORD → CLEAN.

    PLAN      look at the domain, choose chain, ids and datastore, see that there is room
    PREPARE   transfer manager: freeze, begin the job with its checkpoint, thaw  (undo: CLEAN)
    STORE     datastore: read the exports, store, publish                       (undo: DISCARD)
    RECORD    one transaction: image, VM, datastore, restore point, journal      commits
    CLEAN     transfer manager: end the job; keep the checkpoint for the next increment

Nothing that reached PREPARE ends without CLEAN: it is the undo of PREPARE and
the last step of success. It removes the parent's checkpoint only when it is told
SUCCESS, and it is told so only after RECORD. Until then the next backup can
still be an increment of the parent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.exports import Exports, Reason
from oned_backup.contract.provenance import manifest_of
from oned_backup.contract.request import Backup, Outcome, Request
from oned_backup.contract.result import document, whole_number
from oned_backup.errors import (
    Busy,
    Cancelled,
    Conflict,
    DataCorrupt,
    DriverBug,
    InvalidInput,
    Misconfigured,
    NoSpace,
    NotFound,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
)
from oned_backup.model.datastore import Datastore, disabled
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import dump_on_one_line, parse_manifest
from oned_backup.model.vm import (
    DomainState,
    Vm,
    backup_begun,
    backup_ended,
    with_error,
    without_error,
)
from oned_backup.operations import record
from oned_backup.operations.backup_ids import NEW_ID
from oned_backup.operations.backup_plan import BackupPlan, exports_of, live_name, plan_of
from oned_backup.operations.backup_planning import plan_backup
from oned_backup.operations.context import Context
from oned_backup.operations.damage import enter_absence
from oned_backup.operations.delete import owes, removed_later
from oned_backup.operations.domains import look_up_domain
from oned_backup.operations.engine import FailedAttempt, OperationKind, retry_wait
from oned_backup.operations.exclusion import retention_lock, vm_lock
from oned_backup.operations.services import Services
from oned_backup.operations.steps import Step, Undo
from oned_backup.operations.stored import stored_vm_id
from oned_backup.store import OperationState, Transaction

#: the domain changed its state between PLAN and PREPARE: plan again so often
_MOST_REPLANS = 3
_THAW_S = 8


def _begin(context: Context, tx: Transaction) -> None:
    tx.change("vm", context.integer("vm_id"), lambda element: backup_begun(Vm(element)).element)


def _options(context: Context, plan: BackupPlan) -> dict[str, str]:
    settings = context.services.settings
    return {
        "FULL_REASON": plan.full_reason,
        "FREEZE_TIMEOUT_S": f"{settings.freeze_timeout_s:g}",
        "SOCKET_DIR": str(settings.nbd_dir),
        "SCRATCH_DIR": "" if settings.scratch_dir is None else str(settings.scratch_dir),
        "INSTALLATION": context.services.store.installation,
    }


def _chain_id(context: Context, plan: BackupPlan) -> str:
    return plan.backup_id if plan.image_id is None else context.services.image(plan.image_id).source


def _prepare(context: Context) -> Mapping[str, Any]:
    plan = plan_of(context)
    vm = context.services.vm(plan.vm_id)
    datastore = context.services.datastore(plan.datastore_id)
    context.caller.start_ahead(Kind.DATASTORE, datastore.ds_mad, "backup")
    answer = context.backup_caller(plan.transfer).tm(
        live_name("pre_backup", live=plan.live),
        vm.tm_mad,
        backup=plan.backup(_chain_id(context, plan)),
        host=context.services.host(vm.host_id).element,
        vm=vm.element,
        parent=record.parent_exports(context.services.store, plan.vm_id, plan.parent_id),
        options=_options(context, plan),
    )
    root = document(answer, "EXPORTS")
    try:
        exports = Exports.from_xml(root)
    except InvalidInput as error:
        raise DriverBug(f"EXPORTS: {error}") from error
    for disk in exports.disks:
        if disk.type is BackupType.FULL and plan.image_id is not None:
            why = f" ({disk.text})" if disk.text else ""
            context.note(f"disk {disk.disk_id} ({disk.target}) is stored whole: {disk.reason}{why}")
    if plan.image_id is not None and exports.type is BackupType.FULL:
        context.note("new chain: no disk could be continued")
    if exports.freeze.warning:
        context.note(f"freeze: {exports.freeze.warning}")
    return {"exports": xmldoc.serialize(root)}


def _store(context: Context) -> Mapping[str, Any]:
    plan = plan_of(context)
    exports = exports_of(context)
    services = context.services
    vm = services.vm(plan.vm_id)
    continues = exports is not None and exports.type is BackupType.INCREMENT
    image = services.image(plan.image_id) if continues and plan.image_id is not None else None
    backup = plan.backup(_chain_id(context, plan) if image is not None else plan.backup_id)
    if image is None:
        backup = Backup(
            id=plan.backup_id,
            chain_id=plan.backup_id,
            increment_id=0,
            date=plan.date,
            checkpoint=plan.checkpoint,
        )
    context.caller.start_ahead(Kind.TM, vm.tm_mad, live_name("post_backup", live=plan.live))
    try:
        answer = context.backup_caller(plan.transfer).datastore(
            "backup",
            services.datastore(plan.datastore_id),
            backup=backup,
            vm=vm.element,
            image=None if image is None else image.element,
            exports=exports,
            options={**_options(context, plan), **NEW_ID},  # chosen by this attempt's PLAN
        )
    except NotFound as absent:
        if image is not None and enter_absence(context, image):
            raise Busy(f"{absent}: planning again") from absent
        raise
    except (NoSpace, Unavailable):
        services.measured_at.pop(plan.datastore_id, None)  # what was measured is no longer true
        raise
    except (Misconfigured, PermissionDenied) as error:
        _disable(context, plan.datastore_id, error)
        raise
    if answer["BACKUP_ID"] != plan.backup_id:
        raise DriverBug(f"backup: BACKUP_ID is {answer['BACKUP_ID'][:64]}, not {plan.backup_id}")
    return {
        "size_mb": whole_number(answer, "SIZE_MB"),
        "format": answer["FORMAT"],
        "store_id": answer.get("STORE_ID", ""),
        "manifest": _manifest(answer, plan) or _manifest_without_files(context, vm, backup, exports),
    }


def _manifest(answer: Mapping[str, str], plan: BackupPlan) -> str:
    """The manifest that the driver tells, checked; empty if it tells none."""
    text = answer.get("MANIFEST", "")
    if text:
        try:
            told = parse_manifest(text, what="MANIFEST")
        except DataCorrupt as error:
            raise DriverBug(f"backup: {error}") from error
        if told.id != plan.backup_id:
            raise DriverBug(f"backup: MANIFEST is that of {told.id}, not of {plan.backup_id}")
    return text


def _manifest_without_files(context: Context, vm: Vm, backup: Backup, exports: Exports | None) -> str:
    """What the catalogue keeps of a backup whose driver tells no manifest: all but the stored files."""
    if exports is None:
        raise DriverBug("a backup without EXPORTS cannot be described")
    plan = plan_of(context)
    request = Request(
        kind=Kind.DATASTORE,
        operation_id=context.operation.id,
        operation_kind=context.operation.kind,
        backup=backup,
        vm=vm.element,
        options=_options(context, plan),
    )
    return dump_on_one_line(manifest_of(request, exports, ()))


def _disable(context: Context, datastore_id: int, error: OnedBackupError) -> None:
    """No new backups into a datastore that refuses us, until somebody has looked at it."""
    context.services.store.change(
        "datastore", datastore_id, lambda element: disabled(Datastore(element), str(error)).element
    )
    context.note(f"datastore {datastore_id} is disabled for new backups until it is updated")


def _discard(context: Context) -> None:
    """Undo of STORE: nothing of this backup stays in the store, finished or not."""
    plan = plan_of(context)
    services = context.services
    datastore = services.datastore(plan.datastore_id)
    sections: dict[str, Any] = {
        "backup": plan.backup(plan.backup_id),
        "vm": services.vm(plan.vm_id).element,
    }
    with removed_later(context, lambda: _image_beside(services, plan), plan.backup_id):
        context.caller.datastore("backup_cancel", datastore, **sections)
        context.caller.datastore("rm", datastore, **sections, options={"BACKUP_IDS": plan.backup_id})


def _image_beside(services: Services, plan: BackupPlan) -> int | None:
    """An image whose backups lie where this one does; None if there is none."""
    images = (services.image(image_id) for image_id in services.vm(plan.vm_id).backup_ids)
    same = [
        image.id
        for image in images
        if image.is_ready
        and image.datastore_id == plan.datastore_id
        and stored_vm_id(services, image) == plan.vm_id
    ]
    return plan.image_id if plan.image_id is not None else max(same, default=None)


def _clean(context: Context, outcome: Outcome) -> None:
    plan = plan_of(context)
    services = context.services
    vm = services.vm(plan.vm_id)
    keep = plan.checkpoint if outcome is Outcome.SUCCESS else plan.old_checkpoint
    context.backup_caller(plan.transfer).tm(
        live_name("post_backup", live=plan.live),
        vm.tm_mad,
        outcome=outcome,
        backup=plan.backup(plan.backup_id),
        host=services.host(vm.host_id).element,
        vm=vm.element,
        exports=exports_of(context),
        options={**_options(context, plan), "KEEP_CHECKPOINT": keep},
    )


def _clean_after_failure(context: Context) -> None:
    """Undo of PREPARE. Where it is not known how far PREPARE came, the guest is thawed first."""
    plan = plan_of(context)
    if plan.live and (context.recovering or "exports" not in context.facts):
        _make_safe(context, plan)
    _clean(context, Outcome.CANCELLED if context.cancellation_asked else Outcome.FAILURE)


def _make_safe(context: Context, plan: BackupPlan) -> None:
    """Thaw the guest and end our backup job; failing here must not keep CLEAN from running."""
    vm = context.services.vm(plan.vm_id)
    host = context.services.host(vm.host_id)
    options = {
        "DOMAIN": vm.uuid,
        "SOCKET_DIR": str(context.services.settings.nbd_dir),
        "INSTALLATION": context.services.store.installation,
    }
    for action in ("thaw", "abort_backup"):
        try:
            context.caller.vmm(action, host, vm=vm.element, options=options, deadline_s=_THAW_S)
        except NotFound:
            return
        except OnedBackupError as error:
            context.note(f"{action}: {error}")


def _clean_after_success(context: Context) -> None:
    _clean(context, Outcome.SUCCESS)


def _again(context: Context, failed: FailedAttempt) -> float | None:
    """Plan again at once if the guest changed its state; else as for every operation."""
    if failed.step == "PREPARE" and isinstance(failed.error, Busy):
        return 0.05 if context.attempt <= _MOST_REPLANS else None
    final = (Cancelled, NoSpace, DataCorrupt, Misconfigured, PermissionDenied, Conflict)
    if failed.step == "STORE" and not isinstance(failed.error, final) and _guest_stopped(context):
        return 0.05
    return retry_wait(context, failed)


def _guest_stopped(context: Context) -> bool:
    """Whether a backup that began with a running guest lost it on the way; asked only once."""
    plan = plan_of(context)
    if not plan.live or any(note.startswith("the guest stopped") for note in context.notes):
        return False
    vm = context.services.vm(plan.vm_id)
    view = look_up_domain(context.caller, context.services.host(vm.host_id), vm.uuid)
    if view.state is not DomainState.OFF:
        return False
    context.note("the guest stopped in the middle of the backup: backing it up again as it is now, off")
    return True


def _result(context: Context) -> Mapping[str, Any]:
    plan = plan_of(context)
    exports = exports_of(context)
    result: dict[str, Any] = {
        "vm_id": plan.vm_id,
        "datastore_id": plan.datastore_id,
        "live": plan.live,
    }
    if "image_id" in context.facts:
        result |= {
            "backup_id": plan.backup_id,
            "image_id": context.facts["image_id"],
            "increment_id": context.facts["increment_id"],
            "size_mb": context.facts["size_mb"],
        }
    if exports is not None:
        result |= {
            "type": exports.type.value,
            "freeze": asdict(exports.freeze),
            "disks": [
                {
                    "disk_id": disk.disk_id,
                    "target": disk.target,
                    "type": disk.type.value,
                    "reason": disk.reason.value,
                    "text": disk.text,
                    "size_bytes": disk.size_bytes,
                }
                for disk in exports.disks
            ],
            "excluded": [
                {
                    "disk_id": disk.disk_id,
                    "target": disk.target,
                    "reason": disk.reason.value,
                    "text": disk.text,
                }
                for disk in exports.excluded
            ],
        }
    return result


def _ended(context: Context, state: OperationState, error: OnedBackupError | None) -> None:
    """Put the VM's state back, tell it what went wrong, and queue what is to follow.

    That is the retention, if there is work for it; and the verification of a backup that was made because
    there is damage in the store: restic would let it refer to the damaged data again.
    """
    services = context.services
    vm_id = context.integer("vm_id")

    def ended(element: xmldoc.Element) -> xmldoc.Element:
        vm = backup_ended(Vm(element))
        if state is OperationState.DONE:
            vm = without_error(vm)
        elif state is OperationState.FAILED and error is not None:
            when = datetime.fromtimestamp(services.clock(), UTC).strftime("%a %b %d %H:%M:%S %Y")
            vm = with_error(vm, str(error), when)
        return vm.element

    vm = Vm(services.store.change("vm", vm_id, ended))
    if state is OperationState.DONE and (vm.config.rules or owes(services, vm_id)):
        services.store.journal.enqueue("retention", retention_lock(vm_id), {"vm_id": vm_id}, vm_id=vm_id)
    if state is OperationState.DONE and plan_of(context).full_reason == Reason.CHAIN_DAMAGED.value:
        image_id = context.facts["image_id"]
        services.store.journal.enqueue(
            "verify", vm_lock(vm_id), {"image_id": image_id}, vm_id=vm_id, image_id=image_id
        )


BACKUP = OperationKind(
    name="backup",
    steps=(
        Step("PLAN", do=plan_backup, record=_begin),
        Step("PREPARE", do=_prepare, undo=Undo("CLEAN", _clean_after_failure, urgent=True)),
        Step("STORE", do=_store, undo=Undo("DISCARD", _discard)),
        Step("RECORD", record=record.record_backup, commits=True),
        Step("CLEAN", do=_clean_after_success),
    ),
    again=_again,
    result=_result,
    ended=_ended,
)
