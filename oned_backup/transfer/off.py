"""Export the disks of a domain that is off.

qemu-nbd serves each image read-only, with the bitmap that QEMU, or the last
backup in the off state, left in it. The bitmap for the next increment is added, if the image takes one,
*before* that: should we die anywhere, the image has both, and the next attempt
starts from the same parent. While an image is served the domain cannot be
started on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from oned_backup import failpoints
from oned_backup.contract.exports import Exports, Freeze
from oned_backup.errors import Busy, DriverFailed, Unsupported
from oned_backup.hypervisor import domain as domains
from oned_backup.hypervisor import offline, qemu_img
from oned_backup.hypervisor.connection import connected
from oned_backup.hypervisor.domain import Domain, DomainDisk, find_domain
from oned_backup.hypervisor.qemu_img import Image
from oned_backup.model.increments import BackupType
from oned_backup.transfer import clean, companions, deadman, guard, samples
from oned_backup.transfer import disks as disk_set
from oned_backup.transfer.decide import Current, Decision, Tracking, decide, refused
from oned_backup.transfer.task import Task

_Chain = tuple[Image, ...]


def export_off(task: Task, source_dir: Path) -> Exports:
    """Add bitmaps, serve the images. `Busy` if the domain is running, or starts meanwhile."""
    with connected(task.uri) as connection:
        domain = find_domain(connection, task.vm.uuid, task.vm.deploy_id)
        _require_off(domain)
        try:
            return _export(task, domain, source_dir)
        except BaseException:
            clean.undo(task)
            raise


def _export(task: Task, domain: Domain, source_dir: Path) -> Exports:
    xml = domain.xml()
    clean.remove_files(task, domains.disks(xml))
    selection = disk_set.select(task, domains.disks(xml), running=False)
    chains: dict[str, _Chain] = {}
    disks: list[Current] = []
    for entry, found in selection.included:
        chain = qemu_img.backing_chain(task.host, found.source, found.format)
        chains[found.target] = chain
        backing = tuple(image.path for image in chain[1:])
        _require_as_defined(task, found, backing)
        disks.append(disk_set.current(task, entry, found, backing, chain[0].size_bytes))
    decisions = {
        disk.target: decide(disk, task.parent, _tracking(task, chains[disk.target]), task.full_reason)
        for disk in disks
    }
    files = companions.write_definitions(task, domain, source_dir)
    files += companions.write_firmware(task, domain, source_dir)
    tracked, warnings = _track(task, disks, chains)
    failpoints.reach("bitmaps.acted")
    task.host.make_private_dir(task.operation_dir)
    unprotected = deadman.start(task, domain, ())
    served = {disk.target: _serve(task, disk, decisions, chains[disk.target]) for disk in disks}
    failpoints.reach("serve.acted")
    guard.start_for_servers(task.uri, task.operation_dir, task.local_dir)
    _require_off(domain)
    samples_now = samples.check(task, disks, decisions, served)
    number = disk_set.increment_id(task, decisions.values())
    return Exports(
        disks=disk_set.disk_exports(disks, decisions, number, served, samples_now),
        increment_id=number,
        checkpoint=task.checkpoint if tracked else "",
        freeze=Freeze(
            task.vm.config.fs_freeze.value, warning="; ".join(filter(None, (unprotected, *warnings)))
        ),
        excluded=selection.excluded,
        files=files,
    )


def _track(
    task: Task, disks: Sequence[Current], chains: Mapping[str, _Chain]
) -> tuple[list[Current], list[str]]:
    """The disks that have a bitmap for the next increment now, and what to tell of those that took none.

    An image takes none if it is the backing image of a VM that runs, is read-only or damaged, or if its file
    system is full: no reason not to back it up.
    """
    tracked, warnings = [], []
    for disk in disks:
        if not task.checkpoint or disk.untracked:
            continue
        try:
            if task.checkpoint in chains[disk.target][0].bitmaps:  # an earlier attempt's
                qemu_img.remove_bitmap(task.host, disk.source, task.checkpoint)
            qemu_img.add_bitmap(task.host, disk.source, task.checkpoint)
        except (Busy, DriverFailed) as error:
            warnings.append(
                f"{disk.target} is not tracked, the next backup will take it in full: {error.message}"
            )
        else:
            tracked.append(disk)
    return tracked, warnings


def _require_as_defined(task: Task, disk: DomainDisk, backing: Sequence[str]) -> None:
    """Raise `Unsupported` if QEMU's tools, which go by the images alone, see what the guest does not."""

    def is_same(named: str, found: str) -> bool:
        return named == found or task.host.file_id(named) == task.host.file_id(found)

    as_defined = disk.backing + tuple(backing[len(disk.backing) :] if not disk.backing_ends else ())
    same_chain = len(as_defined) == len(backing) and all(map(is_same, as_defined, backing))
    why = disk.special or ("" if same_chain else "has other backing images in the domain's definition")
    if why:
        raise Unsupported(
            f"{disk.target} {why}: it can be backed up only while the domain runs",
            hint="Start the domain, or leave the disk out with DISK_IDS.",
        )


def _tracking(task: Task, chain: _Chain) -> Tracking:
    """What the images say of the bitmap since the parent's checkpoint."""
    layers = offline.tracking_layers(chain, task.parent_checkpoint)
    if not layers:
        return Tracking.MISSING
    bitmaps = [layer.bitmaps[task.parent_checkpoint] for layer in layers]
    if any(bitmap.in_use for bitmap in bitmaps):
        return Tracking.INCONSISTENT
    if not all(bitmap.records for bitmap in bitmaps):
        return Tracking.DISABLED
    return Tracking.USABLE


def _serve(task: Task, disk: Current, decisions: dict[str, Decision], chain: _Chain) -> tuple[str, str, str]:
    """Serve one disk: its socket, its export, and the bitmap of an increment.

    A disk whose changes cannot be gathered becomes full in `decisions`.
    """
    bitmap = ""
    if decisions[disk.target].type is BackupType.INCREMENT:
        try:
            bitmap = _gathered(task, disk, chain)
        except (Busy, DriverFailed) as error:  # an overlay was grown: its bitmaps differ in size
            decisions[disk.target] = refused(error.message)
    server = offline.serve(
        task.host,
        disk.source,
        disk.format,
        directory=task.operation_dir,
        export=disk.target,
        bitmap=bitmap,
    )
    return str(task.host.forward(server.socket)), server.export, bitmap


def _gathered(task: Task, disk: Current, chain: _Chain) -> str:
    """The name of a bitmap in the top image with all changes since the parent's checkpoint."""
    parent, merged = task.parent_checkpoint, task.merged_bitmap
    if merged in chain[0].bitmaps:
        qemu_img.remove_bitmap(task.host, disk.source, merged)
    return offline.gather_changes(task.host, offline.tracking_layers(chain, parent), parent, merged)


def _require_off(domain: Domain) -> None:
    if domain.is_active:
        raise Busy(f"domain {domain.name} is running")
