"""Which of a domain's disks are exported, and the EXPORTS document that tells of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from oned_backup.contract.exports import (
    DiskExport,
    ExcludedDisk,
    Reason,
    disk_file_name,
)
from oned_backup.errors import Misconfigured
from oned_backup.hypervisor.domain import DomainDisk
from oned_backup.model.disk import Disk
from oned_backup.model.increments import BackupType
from oned_backup.model.selection import select_disks
from oned_backup.transfer.decide import TRACKED_FORMAT, Current, Decision
from oned_backup.transfer.task import Task

#: how the file begins if qemu-img was older than 1.7, or was asked for compat=0.10
_VERSION_2 = b"QFI\xfb\0\0\0\2"


@dataclass(frozen=True)
class Selection:
    """The disks to export, each as catalogue and libvirt know it, and those that are left out."""

    included: tuple[tuple[Disk, DomainDisk], ...]
    excluded: tuple[ExcludedDisk, ...]


def select(task: Task, present: Iterable[DomainDisk], *, running: bool) -> Selection:
    """What of the domain's disks is backed up; `Misconfigured` if nothing is.

    While the domain is `running`, disks of which libvirt or QEMU makes no backup are left out.
    """
    by_target = {disk.target: disk for disk in present}
    chosen, left_out = select_disks(task.vm)
    included = []
    excluded = [
        ExcludedDisk(entry.disk.target, Reason(entry.reason.value), entry.disk.disk_id, entry.text)
        for entry in left_out
    ]
    for disk in chosen:
        found = by_target.get(disk.target)
        if found is None:
            text = f"{disk.target} is no longer attached to the domain"
            excluded.append(ExcludedDisk(disk.target, Reason.NO_MEDIUM, disk.disk_id, text))
        elif found.type not in {"file", "block"} or not found.source:
            text = f"{disk.target} has a source of type {found.type}"
            excluded.append(ExcludedDisk(disk.target, Reason.UNSUPPORTED_SOURCE, disk.disk_id, text))
        elif running and found.only_off:
            text = f"{disk.target} {found.only_off}: it can be backed up only while the domain is off"
            excluded.append(ExcludedDisk(disk.target, Reason.UNSUPPORTED_SOURCE, disk.disk_id, text))
        else:
            included.append((disk, found))
    known = {disk.target for disk in task.vm.disks}
    excluded.extend(
        ExcludedDisk(target, Reason.NOT_SELECTED, text=f"{target} was attached just now")
        for target in sorted(by_target.keys() - known)
    )
    if not included:
        reasons = "; ".join(disk.text for disk in excluded) or "it has none"
        raise Misconfigured(f"VM {task.vm.id}: no disk can be backed up: {reasons}")
    return Selection(tuple(included), tuple(excluded))


def current(task: Task, disk: Disk, found: DomainDisk, backing: tuple[str, ...], size_bytes: int) -> Current:
    """A disk as it is now."""
    return Current(
        disk_id=disk.disk_id,
        target=found.target,
        source=found.source,
        source_id=task.host.file_id(found.source),
        backing=backing,
        format=found.format,
        size_bytes=size_bytes,
        untracked=_untracked(task, found),
    )


def _untracked(task: Task, disk: DomainDisk) -> str:
    """Why the image of a disk can keep no dirty bitmaps; empty if it can."""
    if disk.format != TRACKED_FORMAT:
        return f"{disk.format} images keep no dirty bitmaps"
    if task.host.read_start(disk.source, len(_VERSION_2)) == _VERSION_2:
        return "qcow2 images of version 2 keep no dirty bitmaps: `qemu-img amend -o compat=v3` changes that"
    return ""


def increment_id(task: Task, decisions: Iterable[Decision]) -> int:
    """The number of this backup in its chain: 0, a new chain, if every disk is full."""
    if all(decision.type is BackupType.FULL for decision in decisions):
        return 0
    return task.backup.increment_id if task.backup else 0


def disk_exports(
    disks: Iterable[Current],
    decisions: Mapping[str, Decision],
    number: int,
    served: Mapping[str, tuple[str, str, str]],
    samples: Mapping[str, str],
) -> tuple[DiskExport, ...]:
    """The DISK elements; `served` has socket, export and bitmap of each target."""
    exports = []
    for disk in disks:
        decision = decisions[disk.target]
        socket, name, bitmap = served[disk.target]
        exports.append(
            DiskExport(
                disk_id=disk.disk_id,
                target=disk.target,
                file=disk_file_name(disk.disk_id, number),
                type=decision.type,
                reason=decision.reason,
                text=decision.text,
                size_bytes=disk.size_bytes,
                format=disk.format,
                source=disk.source,
                source_id=disk.source_id,
                sample=samples.get(disk.target, ""),
                backing=disk.backing,
                nbd_socket=socket,
                nbd_export=name,
                dirty_bitmap=bitmap if decision.type is BackupType.INCREMENT else "",
            )
        )
    return tuple(exports)
