"""Which disks of a VM are backed up, which are not, and why.

Never: SWAP, CD-ROM, floppy, disks without a medium, read-only disks (their
content cannot change, and no bitmap can be kept in them), and sources that
QEMU does not hand out as a file or block device. Volatile disks only with
BACKUP_VOLATILE=YES. Of the rest, those in DISK_IDS if that is set. An id in
DISK_IDS whose disk has gone stays there and selects nothing: a detached disk
must not turn "these disks" into "all disks".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from oned_backup.errors import InvalidInput, NothingToBackUp
from oned_backup.model.backup_config import BackupConfig, Mode, updated
from oned_backup.model.disk import Disk
from oned_backup.model.vm import Vm, with_config


class Exclusion(StrEnum):
    """Why a disk is not backed up; the values are reason codes of the driver contract."""

    CDROM = "cdrom"
    FLOPPY = "floppy"
    VOLATILE = "volatile"
    NOT_SELECTED = "not-selected"
    READ_ONLY = "read-only"
    NO_MEDIUM = "no-medium"
    UNSUPPORTED_SOURCE = "unsupported-source"


@dataclass(frozen=True)
class ExcludedDisk:
    """A disk that stays out of the backup; `text` explains it to a person."""

    disk: Disk
    reason: Exclusion
    text: str


_BACKED_UP = frozenset({"FILE", "BLOCK", "FS"})


def select_disks(vm: Vm) -> tuple[tuple[Disk, ...], tuple[ExcludedDisk, ...]]:
    """The disks to back up, and the others with the reason, each in order of disk ids."""
    return select(vm.disks, vm.config)


def refuse_without_disks(vm: Vm) -> None:
    """`NothingToBackUp` unless the VM has a disk to back up."""
    included, excluded = select_disks(vm)
    if not included:
        reasons = "; ".join(entry.text for entry in excluded) or "it has none"
        raise NothingToBackUp(f"VM {vm.id} ({vm.name}) has no disk to back up: {reasons}")


def select(disks: Iterable[Disk], config: BackupConfig) -> tuple[tuple[Disk, ...], tuple[ExcludedDisk, ...]]:
    """As `select_disks`, for any disks and configuration."""
    included = []
    excluded = []
    for disk in disks:
        verdict = _exclusion(disk, config)
        if verdict is None:
            included.append(disk)
        else:
            excluded.append(ExcludedDisk(disk, *verdict))
    return tuple(included), tuple(excluded)


def configure(vm: Vm, values: Mapping[str, str]) -> Vm:
    """`vm` with the user's BACKUP_CONFIG values; `InvalidInput` if one is wrong.

    DISK_IDS may only name disks that the VM has and that can be backed up. The
    active chain ends if the mode or the set of backed-up disks becomes another.
    """
    old = vm.config
    new = updated(old, values)
    if "DISK_IDS" in values or "BACKUP_VOLATILE" in values:
        _check_disk_ids(vm, new)
    if old.mode is new.mode is Mode.INCREMENT and _chosen(vm, old) == _chosen(vm, new):
        new = replace(
            new,
            incremental_backup_id=old.incremental_backup_id,
            last_increment_id=old.last_increment_id,
        )
    return with_config(vm, new)


def _chosen(vm: Vm, config: BackupConfig) -> set[int]:
    return {disk.disk_id for disk in select(vm.disks, config)[0]}


def _check_disk_ids(vm: Vm, config: BackupConfig) -> None:
    present = {disk.disk_id for disk in vm.disks}
    for disk_id in config.disk_ids:
        if disk_id not in present:
            known = ", ".join(f"{disk.disk_id} ({disk.target})" for disk in vm.disks) or "none"
            raise InvalidInput(f"DISK_IDS: VM {vm.id} has no disk {disk_id}", hint=f"It has {known}.")
    for excluded in select(vm.disks, config)[1]:
        if excluded.disk.disk_id in config.disk_ids:
            raise InvalidInput(
                f"DISK_IDS: disk {excluded.disk.disk_id} of VM {vm.id} cannot be backed up: {excluded.text}"
            )


def _exclusion(disk: Disk, config: BackupConfig) -> tuple[Exclusion, str] | None:
    """The first rule that keeps `disk` out."""
    unsupported = disk.type not in _BACKED_UP
    not_selected = bool(config.disk_ids) and disk.disk_id not in config.disk_ids
    rules = (
        (disk.type in {"CDROM", "RBD_CDROM"}, Exclusion.CDROM, "is a CD-ROM"),
        (disk.type == "FLOPPY", Exclusion.FLOPPY, "is a floppy disk"),
        (disk.type == "SWAP", Exclusion.VOLATILE, "is swap space"),
        (
            disk.type == "FS" and not config.backup_volatile,
            Exclusion.VOLATILE,
            "is volatile and BACKUP_VOLATILE is NO",
        ),
        (unsupported, Exclusion.UNSUPPORTED_SOURCE, f"has a source of type {disk.type.lower()}"),
        (not disk.source, Exclusion.NO_MEDIUM, "has no source"),
        (disk.read_only, Exclusion.READ_ONLY, "is read-only"),
        (not_selected, Exclusion.NOT_SELECTED, "is not in DISK_IDS"),
    )
    return next(((reason, f"{disk.target} {text}") for applies, reason, text in rules if applies), None)
