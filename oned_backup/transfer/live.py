"""Export the disks of a domain that runs.

One pull job over all disks, started together with its checkpoint at one instant
while the guest is frozen. Whatever goes wrong on the way is undone here; should
this process be killed, `clean` undoes it by the names that were fixed beforehand.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from oned_backup.contract.exports import Exports, Freeze
from oned_backup.errors import Busy, Conflict, DriverFailed, PermissionDenied
from oned_backup.hypervisor import backup_job, checkpoints, emulator, freeze, guardian, qemu_img
from oned_backup.hypervisor import domain as domains
from oned_backup.hypervisor.backup_job import JobDisk
from oned_backup.hypervisor.connection import CheckpointUnusable, connected
from oned_backup.hypervisor.domain import Domain, DomainDisk, find_domain
from oned_backup.model.increments import BackupType
from oned_backup.transfer import clean, companions, deadman, guard, samples
from oned_backup.transfer import disks as disk_set
from oned_backup.transfer.decide import Current, Decision, Tracking, decide, refused
from oned_backup.transfer.task import Task


def export_live(task: Task, source_dir: Path) -> Exports:
    """Freeze, begin the job, thaw. `Busy` if the domain is off or has somebody else's backup job."""
    with connected(task.uri) as connection:
        domain = find_domain(connection, task.vm.uuid, task.vm.deploy_id)
        if not domain.is_active:
            raise Busy(f"domain {domain.name} is not running")
        try:
            return _export(task, domain, source_dir)
        except BaseException:
            clean.undo(task)
            raise


def _export(task: Task, domain: Domain, source_dir: Path) -> Exports:
    _take_over(task, domain)
    xml = domain.xml()
    present = domains.disks(xml)
    selection = disk_set.select(task, present, running=True)
    _refuse_shared(domain, (found for _, found in selection.included))
    backup_job.require_no_block_jobs(domain, (found.target for _, found in selection.included))
    if domains.has_iothreads(xml):
        emulator.require_outlives_readers(task.host, domain)
    disks = [
        disk_set.current(task, disk, found, found.backing, domain.capacity_bytes(found.target))
        for disk, found in selection.included
    ]
    decisions = _decisions(task, domain, disks)
    files = companions.write_definitions(task, domain, source_dir)
    if task.scratch_dir:
        task.host.make_dir(task.scratch_dir)
    blocks = {found.target for _, found in selection.included if found.type == "block"}
    scratch = {
        disk.target: task.scratch_path(disk.source, disk.target, is_block=disk.target in blocks)
        for disk in disks
    }
    folders = sorted({path.parent for path in scratch.values()})
    guard.require_scratch(task.host, folders)
    socket = task.operation_dir / "qemu" / "nbd.sock"
    task.host.make_private_dir(task.operation_dir)
    qemu_uid = domains.qemu_uid(xml)
    task.host.lend_dir(socket.parent, qemu_uid)
    scratch_is_there = _make_scratch(task, disks, scratch, qemu_uid)
    tracked = [disk.target for disk in disks if task.checkpoint and not disk.untracked]
    others = [disk.target for disk in present if disk.target not in decisions]

    unprotected = deadman.start(task, domain, folders)
    mode = freeze.Mode(task.vm.config.fs_freeze.value)
    with freeze.frozen(
        task.host,
        domain,
        mode,
        timeout_s=task.freeze_timeout_s,
        directory=task.operation_dir,
        guarded=partial(guardian.on_guard, task.uri, domain.uuid),
    ) as window:
        job = _begin(task, domain, _Job(socket, disks, scratch, scratch_is_there, others, tracked), decisions)

    local_socket = task.host.forward(socket)
    guard.start(task, domain, folders)
    files += companions.write_firmware(task, domain, source_dir)
    served = {disk.target: (str(local_socket), disk.target, disk.bitmap) for disk in job}
    samples_now = samples.check(task, disks, decisions, served)
    number = disk_set.increment_id(task, decisions.values())
    return Exports(
        disks=disk_set.disk_exports(disks, decisions, number, served, samples_now),
        increment_id=number,
        checkpoint=task.checkpoint if tracked else "",
        freeze=Freeze(
            mode.value,
            window.method.value,
            window.milliseconds,
            "; ".join(filter(None, (window.warning, unprotected, companions.left_out(domain, files)))),
        ),
        excluded=selection.excluded,
        files=files,
    )


def _take_over(task: Task, domain: Domain) -> None:
    """Remove what an earlier attempt left; `Busy` if the domain has a backup job that is not ours."""
    freeze.resume_if_noted(task.host, domain, task.socket_dir)
    guardian.thaw_if_noted(task.uri, task.host, domain, task.socket_dir)
    clean.end_job(task, domain)
    socket = backup_job.current_socket(domain)
    if socket is not None:
        raise Busy(f"domain {domain.name} has a backup job of somebody else, at {socket}")
    backup_job.require_no_other(domain)  # not to be found out while the guest is frozen
    clean.remove_files(task, domains.disks(domain.xml()))
    if task.checkpoint:
        checkpoints.remove(domain, task.checkpoint)


def _refuse_shared(domain: Domain, disks: Iterable[DomainDisk]) -> None:
    """`Conflict` if a disk is in use by another domain: QEMU cannot keep what others overwrite."""
    for disk in disks:
        if disk.shareable and (others := domains.others_with(domain, disk.source)):
            raise Conflict(
                f"{disk.target} is shared with domain {others[0]}, which runs: it cannot be backed up now",
                hint="Leave the disk out with DISK_IDS, or stop the other domain.",
            )


def _decisions(task: Task, domain: Domain, disks: Iterable[Current]) -> dict[str, Decision]:
    """How each disk is backed up, by its target, after QEMU has vouched for the bitmaps."""
    hoped = {disk.target: decide(disk, task.parent, Tracking.USABLE, task.full_reason) for disk in disks}
    candidates = [target for target, decision in hoped.items() if decision.type is BackupType.INCREMENT]
    if not candidates:
        return hoped
    usable = checkpoints.usable_targets(domain, task.parent_checkpoint, candidates)
    for disk in disks:
        if disk.target in candidates and disk.target not in usable:
            image = qemu_img.top_image(task.host, disk.source, disk.format)
            listed = task.parent_checkpoint in image.bitmaps
            tracking = Tracking.INCONSISTENT if listed else Tracking.MISSING
            hoped[disk.target] = decide(disk, task.parent, tracking, task.full_reason)
    return hoped


@dataclass(frozen=True)
class _Job:
    """What a job is made of, besides which disks are full."""

    socket: Path
    disks: Sequence[Current]
    scratch: Mapping[str, Path]
    scratch_is_there: bool
    others: Sequence[str]
    tracked: Sequence[str]


def _make_scratch(task: Task, disks: Iterable[Current], scratch: Mapping[str, Path], uid: int) -> bool:
    """Whether the scratch files are there and belong to QEMU's user; else libvirt makes them.

    It leaves them to root where its dynamic_ownership is off, as on OpenNebula's hosts. Where root
    may not give files away (a client of NFS) it makes them as QEMU's user.
    """
    if uid in {0, os.geteuid()}:
        return False
    try:
        for disk in disks:
            qemu_img.create(task.host, str(scratch[disk.target]), disk.size_bytes)
            task.host.give(scratch[disk.target], uid)
    except (DriverFailed, PermissionDenied):
        for path in scratch.values():
            task.host.remove(path)
        return False
    return True


def _begin(task: Task, domain: Domain, job: _Job, decisions: dict[str, Decision]) -> list[JobDisk]:
    """Start the job; a disk whose bitmap libvirt refuses after all becomes full in `decisions`."""
    untracked = [disk.target for disk in job.disks if disk.target not in job.tracked]
    checkpoint = ""
    if job.tracked:
        checkpoint = checkpoints.checkpoint_xml(task.checkpoint, job.tracked, [*untracked, *job.others])
    cleared = False
    while True:
        disks = [
            JobDisk(
                disk.target,
                job.scratch[disk.target],
                task.parent_checkpoint if decisions[disk.target].type is BackupType.INCREMENT else "",
            )
            for disk in job.disks
        ]
        try:
            document = backup_job.job_xml(job.socket, disks, job.others)
            backup_job.begin(domain, document, checkpoint, scratch_is_there=job.scratch_is_there)
        except CheckpointUnusable as error:
            _make_full(error.message, decisions)
        except DriverFailed as error:
            if "can't be merged" in error.message:  # an overlay was grown: its bitmaps differ in size
                _make_full(error.message, decisions)
                continue
            if cleared or "already exists" not in error.message:
                raise
            cleared = True  # a bitmap of this name that libvirt does not list
            for target in job.tracked:
                checkpoints.remove_bitmap(domain, task.checkpoint, target)
        else:
            return disks


def _make_full(text: str, decisions: dict[str, Decision]) -> None:
    """Give up the increment of the disk that libvirt names; of all disks if it names none."""
    increments = [target for target, decision in decisions.items() if decision.type is BackupType.INCREMENT]
    if not increments:
        raise DriverFailed(text)
    named = [target for target in increments if f"'{target}'" in text]
    for target in named or increments:
        decisions[target] = refused(text)
