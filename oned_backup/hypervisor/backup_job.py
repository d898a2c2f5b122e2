"""Pull-mode backup jobs: QEMU keeps the disks' content of one instant and serves it over NBD.

The job lives in QEMU. It outlives us and libvirtd, and holds up snapshots,
migration and detaching until it is aborted, so every job is found again by
where its socket lies, and ended by `abort`. What the guest overwrites meanwhile
goes to one scratch file a disk.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import libvirt

from oned_backup import failpoints, xmldoc
from oned_backup.errors import Busy, NotFound, OnedBackupError, PermissionDenied, Unavailable
from oned_backup.hypervisor.connection import libvirt_errors
from oned_backup.hypervisor.domain import Domain

_ABORT_TIMEOUT_S = 60.0
_POLL_S = 0.02

#: what a job waits for: libvirt does one such thing with a domain at a time
_OTHERS = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "is being migrated here",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "is being migrated",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "is being saved",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "is being dumped",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "is given a snapshot",
}

#: what libvirt does with a disk, and does not combine with a backup
_BLOCK_JOBS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "being pulled from its backing image",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "being copied",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "being committed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "being committed",
}


@dataclass(frozen=True)
class JobDisk:
    """A disk in the job; with a `checkpoint`, what changed since then is offered as a bitmap."""

    target: str
    scratch: Path
    checkpoint: str = ""

    @property
    def bitmap(self) -> str:
        """Name of the bitmap that the export offers; empty for a full."""
        return f"backup-{self.target}" if self.checkpoint else ""


def job_xml(socket: Path, disks: Sequence[JobDisk], others: Iterable[str]) -> str:
    """The document for a job over `disks`, each full or incremental, and not over `others`."""
    root = xmldoc.build("domainbackup")
    root.set("mode", "pull")
    server = xmldoc.build("server")
    server.attrib.update({"transport": "unix", "socket": str(socket)})
    listed = xmldoc.build("disks")
    for disk in disks:
        element = xmldoc.build("disk")
        element.attrib.update(
            {"name": disk.target, "backup": "yes", "type": "file", "exportname": disk.target}
        )
        if disk.checkpoint:
            element.attrib.update(
                {
                    "backupmode": "incremental",
                    "incremental": disk.checkpoint,
                    "exportbitmap": disk.bitmap,
                }
            )
        else:
            element.set("backupmode", "full")
        scratch = xmldoc.build("scratch")
        scratch.set("file", str(disk.scratch))
        element.append(scratch)
        listed.append(element)
    for target in others:
        element = xmldoc.build("disk")
        element.attrib.update({"name": target, "backup": "no"})
        listed.append(element)
    root.append(server)
    root.append(listed)
    return xmldoc.serialize(root)


def begin(domain: Domain, job: str, checkpoint: str = "", *, scratch_is_there: bool = False) -> None:
    """Start the job, with its checkpoint at the same instant. Scratch files are made unless they are there.

    `CheckpointUnusable` if a disk's bitmap cannot be used after all, `Busy` if
    something else holds the domain, `PermissionDenied` if QEMU must not make its socket or scratch files.
    """
    try:
        with libvirt_errors(f"backup of domain {domain.name}"):
            failpoints.reach("job.begun")
            flags = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL if scratch_is_there else 0
            domain.handle.backupBegin(job, checkpoint or None, flags)
    except PermissionDenied as error:
        hint = (
            "Let QEMU's user write there. AppArmor may be in its way (see `oned-backup doctor`), or SELinux."
        )
        raise PermissionDenied(error.message, hint=hint) from error
    failpoints.reach("job.acted")


def current_socket(domain: Domain) -> Path | None:
    """The NBD socket of the backup job that runs now; None if none runs. A push job has the socket `-`."""
    try:
        with libvirt_errors(f"backup job of domain {domain.name}"):
            root = xmldoc.parse(domain.handle.backupGetXMLDesc(0), what="backup job")
    except NotFound:
        return None
    server = root.find("server")
    return Path("-" if server is None else server.get("socket", "-"))


def is_beneath(socket: Path | None, directory: Path) -> bool:
    """Whether a job's socket lies in `directory`, at any depth."""
    return socket is not None and ".." not in socket.parts and directory in socket.parents


def abort(domain: Domain, socket_dir: Path) -> bool:
    """End the backup job whose socket lies beneath `socket_dir`; False if there is none.

    Somebody else's job is never touched. Returns when the job is gone. A job that is just
    being started, by a client that has died meanwhile, is waited for.
    """
    deadline = time.monotonic() + _ABORT_TIMEOUT_S
    while _is_starting(domain) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    found = accepted = False
    while domain.is_active and is_beneath(current_socket(domain), socket_dir):
        found = True
        if time.monotonic() > deadline:
            raise Unavailable(
                f"domain {domain.name}: the backup job does not end within {_ABORT_TIMEOUT_S:g} s"
            )
        if accepted:
            time.sleep(_POLL_S)
            continue
        # It may have ended by itself since we looked. Or libvirt waits for QEMU on behalf of somebody
        # else, and refuses after 30 s: then it is asked again.
        with contextlib.suppress(OnedBackupError), libvirt_errors(f"end the backup of domain {domain.name}"):
            domain.handle.abortJob()
            accepted = True
    return found


def require_no_other(domain: Domain) -> None:
    """Raise `Busy` if libvirt does something with the domain that a job would have to wait for."""
    with libvirt_errors(f"job of domain {domain.name}"):
        stats: dict[str, int] = domain.handle.jobStats(0)
    doing = _OTHERS.get(stats.get("operation", libvirt.VIR_DOMAIN_JOB_OPERATION_UNKNOWN))
    if doing and stats.get("type") != libvirt.VIR_DOMAIN_JOB_NONE:
        raise Busy(f"domain {domain.name} {doing}")


def require_no_block_jobs(domain: Domain, targets: Iterable[str]) -> None:
    """Raise `Busy` if the image of one of these disks is just being copied, committed or pulled."""
    for target in targets:
        with libvirt_errors(f"block job of {target} of domain {domain.name}"):
            info: dict[str, int] = domain.handle.blockJobInfo(target)
        if info:
            doing = _BLOCK_JOBS.get(info["type"], "in use by a block job")
            raise Busy(
                f"{target} of domain {domain.name} is {doing}",
                hint="Let that job end, or end it with `virsh blockjob`.",
            )


def _is_starting(domain: Domain) -> bool:
    """Whether libvirt is at work on a backup job that cannot be looked at yet."""
    return current_socket(domain) is None and _backup_statistics(domain) is not None


def _backup_statistics(domain: Domain) -> dict[str, int] | None:
    """What libvirt tells of the backup job that runs or is being started; None if there is none."""
    if not domain.is_active:
        return None
    with libvirt_errors(f"job of domain {domain.name}"):
        stats: dict[str, int] = domain.handle.jobStats(0)
    is_backup = stats.get("operation") == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP
    return stats if is_backup and stats.get("type") != libvirt.VIR_DOMAIN_JOB_NONE else None
