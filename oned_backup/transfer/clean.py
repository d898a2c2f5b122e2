"""After a backup, whatever became of it: end the job, and leave nothing but the checkpoint that is kept.

Everything is found by names that were fixed before it was made: the job and the
servers by the socket directory of the operation, scratch files by the
operation's id, checkpoints and bitmaps by the installation's prefix. So this
works when the one who made them died anywhere, twice, and in whatever state the
domain is by now. What does not carry our names is not touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from oned_backup import failpoints
from oned_backup.errors import Busy, DataCorrupt, DriverFailed, NotFound, OnedBackupError, Unsupported
from oned_backup.hypervisor import backup_job, checkpoints, freeze, offline, qemu_img
from oned_backup.hypervisor import domain as domains
from oned_backup.hypervisor.connection import connected
from oned_backup.hypervisor.domain import Domain, DomainDisk, find_domain
from oned_backup.hypervisor.host import LocalHost
from oned_backup.transfer import guard
from oned_backup.transfer.decide import TRACKED_FORMAT
from oned_backup.transfer.task import BLOCK_SCRATCH_DIR, Task


def clean_up(task: Task) -> str:
    """Remove all of the operation, and all our checkpoints on the VM's disks but the one to keep.

    Returns why the job was aborted before its time; empty if it was not.
    """
    reason = guard.reason_of_abort(task)
    end_here(task)
    offline.stop_servers(task.host, task.operation_dir)
    with connected(task.uri) as connection:
        try:
            domain = find_domain(connection, task.vm.uuid, task.vm.deploy_id)
        except NotFound:
            remove_files(task, ())
            return reason
        freeze.resume_if_noted(task.host, domain, task.socket_dir)
        # Without its directory a job that a killed driver has asked for, and that libvirt has
        # not begun, cannot begin any more.
        task.host.remove(task.operation_dir)
        end_job(task, domain)
        failpoints.reach("job.ended")
        present = domains.disks(domain.xml())
        remove_files(task, present)
        failpoints.reach("files.removed")
        _remove_checkpoints(task, domain)
        if domain.is_active:
            _remove_strays(task, domain, present)
        else:
            remove_image_bitmaps(task, present, lambda name: name != task.keep_checkpoint)
    return reason


def undo(task: Task) -> None:
    """Remove what a failed export of this operation has made, as far as it can be done now.

    Every other checkpoint stays: the next attempt continues from the parent.
    """
    with contextlib.suppress(OnedBackupError, OSError), connected(task.uri) as connection:
        domain = find_domain(connection, task.vm.uuid, task.vm.deploy_id)
        present = domains.disks(domain.xml())
        freeze.resume_if_noted(task.host, domain, task.socket_dir)  # the note goes with the other files
        end_job(task, domain)
        remove_files(task, present)
        if task.checkpoint and domain.is_active:
            checkpoints.remove(domain, task.checkpoint)
        elif not domain.is_active:
            remove_image_bitmaps(task, present, lambda name: name in {task.checkpoint, task.merged_bitmap})


def end_here(task: Task) -> None:
    """End what runs on this machine for an operation on another one, which need not be reachable."""
    if task.host.machine:
        task.host.end_forwards()
        guard.stop(task.local_dir)
        LocalHost().remove(task.local_dir)


def end_job(task: Task, domain: Domain) -> None:
    """End a backup job of ours, of this operation or of an earlier one that died.

    A guest that could not save to its scratch file goes on, also if who ended the job died before that.
    """
    backup_job.abort(domain, task.socket_dir)
    freeze.resume_after_io_error(domain)


def remove_files(task: Task, present: Iterable[DomainDisk]) -> None:
    """End the operation's servers and remove its sockets and scratch files."""
    end_here(task)
    offline.stop_servers(task.host, task.operation_dir)
    sources = {disk.source for disk in present} | {disk.source for disk in task.vm.disks}
    folders = {Path(source).parent for source in sources if source.startswith("/")} | {BLOCK_SCRATCH_DIR}
    for folder in folders | ({task.scratch_dir} if task.scratch_dir else set()):
        for name in task.host.names(folder):
            if name.startswith(task.scratch_prefix):
                task.host.remove(folder / name)
    task.host.remove(task.operation_dir)


def remove_image_bitmaps(task: Task, present: Iterable[DomainDisk], is_stray: Callable[[str], bool]) -> None:
    """Remove those of our bitmaps that `is_stray` tells from the images of a domain that is off.

    After a backup, those that cannot be removed now do no harm: the next one's clean-up looks for them again.
    """
    for disk in present:
        if not _is_tracked(disk):
            continue
        try:
            _remove_from_images(task, disk, is_stray)
        except (Busy, DataCorrupt, DriverFailed, NotFound, Unsupported):
            if task.backup is None:
                raise


def _remove_from_images(task: Task, disk: DomainDisk, is_stray: Callable[[str], bool]) -> None:
    """The same for one disk.

    An image below the top one may be the disk of another VM, which needs its own bitmaps: there
    only those go that this operation knows by name.
    """
    if disk.special:
        raise Unsupported(
            f"{disk.target} {disk.special}: its bitmaps can be removed only while the domain runs"
        )
    known = {task.checkpoint, task.parent_checkpoint, task.merged_bitmap}
    for layer, image in enumerate(qemu_img.backing_chain(task.host, disk.source, disk.format)):
        for name in image.bitmaps:
            if name.startswith(task.own_prefix) and is_stray(name) and (layer == 0 or name in known):
                try:
                    qemu_img.remove_bitmap(task.host, image.path, name)
                except (Busy, DriverFailed):
                    if layer == 0:
                        raise
                    # a backing image that others use, or that is read-only: no harm done


def _remove_checkpoints(task: Task, domain: Domain) -> None:
    for name in checkpoints.names(domain, task.own_prefix):
        if name != task.keep_checkpoint:
            checkpoints.remove(domain, name)


def _remove_strays(task: Task, domain: Domain, present: Iterable[DomainDisk]) -> None:
    """Remove bitmaps of ours from a running domain's images that libvirt does not list."""
    for disk in present:
        if not _is_tracked(disk):
            continue
        for name in qemu_img.top_image(task.host, disk.source, disk.format).bitmaps:
            if name.startswith(task.own_prefix) and name != task.keep_checkpoint:
                checkpoints.remove_bitmap(domain, name, disk.target)


def _is_tracked(disk: DomainDisk) -> bool:
    return disk.device == "disk" and disk.format == TRACKED_FORMAT and disk.source.startswith("/")
