"""A VM as the daemon sees it, for tests: its document, its drivers run as the daemon runs them, its chain.

`backup` makes a restore point and, at the same instant, a copy of every disk by
QEMU alone (a push-mode job while the guest is suspended; qemu-img while it is
off). `assert_restores` compares what our chain restores to with that copy.
"""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab import Guest, wait_for

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.exports import DiskExport, Exports
from oned_backup.contract.request import Backup, Outcome, Request
from oned_backup.disk.chain import Layer
from oned_backup.disk.image import open_export
from oned_backup.disk.restore import restore_chain
from oned_backup.model.backup_config import BackupConfig, FsFreeze, Mode
from oned_backup.model.host import Host, new_host, with_paths
from oned_backup.model.increments import BackupType
from oned_backup.model.names import checkpoint_name
from oned_backup.model.vm import DomainState, Vm, new_vm, sync_domain, with_config
from oned_backup.runner.drivers import find_driver
from oned_backup.runner.run import Invocation, Limits, run_action

DRIVERS = Path(__file__).parents[2] / "drivers"
INSTALLATION = "0badcafe"
LIMITS = Limits(deadline_s=60)


@dataclass
class RestorePoint:
    """One backup: what was exported, and each disk's content as QEMU saw it."""

    backup_id: str
    exports: Exports
    files: Path
    truth: dict[str, Path] = field(default_factory=dict)
    layers: dict[str, tuple[Layer, ...]] = field(default_factory=dict)

    def disk(self, target: str) -> DiskExport:
        """The export of one disk."""
        return next(disk for disk in self.exports.disks if disk.target == target)

    def reason(self, target: str) -> str:
        """Why the disk was backed up as it was."""
        return self.disk(target).reason.value

    def excluded(self) -> dict[str, str]:
        """The reasons of the disks that were left out."""
        return {disk.target: disk.reason.value for disk in self.exports.excluded}


class BackedUpVm:
    """One VM and its active chain."""

    def __init__(
        self, guest: Guest, directory: Path, socket_dir: Path, *, uri: str = "", tm: str = "qcow2"
    ) -> None:
        self.guest = guest
        self.directory = directory
        self.socket_dir = socket_dir
        self.tm_mad = tm
        self.host = _host(guest, uri)
        #: variables that the daemon would give to drivers
        self.environment: dict[str, str] = {}
        self.points: list[RestorePoint] = []
        self.log: list[str] = []
        self._numbers = itertools.count()
        self._layers: dict[str, list[Layer]] = {}
        self._vm: Vm | None = None
        self.config = BackupConfig(mode=Mode.INCREMENT)

    # --- drivers, run as the daemon runs them

    def vmm(self, action: str, **options: str) -> dict[str, str]:
        """An action of the hypervisor driver."""
        request = Request(Kind.VMM, "op-0123456789ab", action, host=self.host.element, options=options)
        return self._run(Kind.VMM, "kvm", action, request, self._invocation())

    def tm(
        self,
        action: str,
        backup: Backup,
        *,
        files: Path,
        operation_id: str,
        outcome: Outcome | None = None,
        transfer: str = "stream",
        limits: Limits = LIMITS,
        **options: str,
    ) -> dict[str, str]:
        """An action of the transfer manager for `backup`."""
        parent = self.points[-1] if backup.parent_id and self.points else None
        request = Request(
            Kind.TM,
            operation_id,
            "backup",
            outcome=outcome,
            backup=backup,
            host=self.host.element,
            vm=self.document().element,
            parent=parent.exports if parent else None,
            options={
                "INSTALLATION": INSTALLATION,
                "SOCKET_DIR": str(self.socket_dir),
                "SCRATCH_DIR": "",
                "FREEZE_TIMEOUT_S": "10",
                **options,
            },
        )
        invocation = self._invocation(source_dir=files, transfer=transfer)
        return self._run(Kind.TM, self.tm_mad, action, request, invocation, limits=limits)

    def document(self) -> Vm:
        """The VM's document, brought up to date with the hypervisor."""
        answer = self.vmm("dump_xml", DOMAIN=self.guest.uuid)
        domain = xmldoc.parse(answer["DOMAIN"])
        state = DomainState(answer["STATE"])
        pairs = (item.rpartition(":") for item in answer["CAPACITY"].split(",") if item)
        sizes = {target: int(size) for target, _, size in pairs}
        if self._vm is None:
            self._vm = new_vm(
                7,
                name=self.guest.name,
                placement=self.host.placement,
                domain=domain,
                state=state,
                capacity_bytes=sizes,
                date=0,
                config=self.config,
            )
        else:
            self._vm = sync_domain(self._vm, domain, state, sizes, date=0)
        self._vm = with_config(self._vm, self.config)
        return self._vm

    # --- backups

    def next_backup(self, *, parent: bool | None = None) -> Backup:
        """The next place in the chain; without a parent a new chain begins."""
        number = next(self._numbers)
        backup_id = f"20260101-000000-{number:06x}"
        has_parent = bool(self.points) if parent is None else parent
        return Backup(
            id=backup_id,
            chain_id=backup_id,
            increment_id=number if has_parent else 0,
            date=number,
            parent_id=self.points[-1].backup_id if has_parent and self.points else "",
            checkpoint=checkpoint_name(INSTALLATION, backup_id),
        )

    def backup(
        self,
        *,
        fs_freeze: str = "NONE",
        meanwhile: Callable[[], object] = lambda: None,
        parent: bool | None = None,
        transfer: str = "stream",
        **options: str,
    ) -> RestorePoint:
        """A complete backup; `meanwhile` runs after the guest goes on and before its disks are read."""
        self.config = replace(self.config, fs_freeze=FsFreeze(fs_freeze))
        backup = self.next_backup(parent=parent)
        operation_id = f"op-{int(backup.id[-6:], 16):012x}"
        files = self.directory / backup.id
        files.mkdir()
        live = self.guest.is_active()
        action = "pre_backup_live" if live else "pre_backup"
        with self._same_instant(backup.id, suspended=live and fs_freeze == "NONE") as truth:
            answer = self.tm(
                action, backup, files=files, operation_id=operation_id, transfer=transfer, **options
            )
        point = RestorePoint(backup.id, Exports.from_xml(xmldoc.parse(answer["EXPORTS"])), files, truth)
        meanwhile()
        self._store(point)
        action = action.replace("pre_", "post_")
        self.tm(
            action,
            backup,
            files=files,
            operation_id=operation_id,
            outcome=Outcome.SUCCESS,
            KEEP_CHECKPOINT=point.exports.checkpoint,
        )
        self.points.append(point)
        self.assert_nothing_left(operation_id)
        return point

    def assert_restores(self, target: str, number: int = -1) -> None:
        """The disk's chain restores to what QEMU itself copied at that point, the newest."""
        point = self.points[number]
        restored = self.directory / f"restored-{target}"
        restore_chain(point.layers[target], restored, format="raw")
        compare(restored, point.truth[target])
        restored.unlink()

    def assert_survived(self) -> None:
        """After a fault: every restore point is as it was, and the next backup is an increment of all."""
        for number, point in enumerate(self.points):
            for target in point.truth.keys() & point.layers.keys():
                self.assert_restores(target, number)
        point = self.backup()
        assert {disk.reason.value for disk in point.exports.disks} == {"increment"}
        for disk in point.exports.disks:
            self.assert_restores(disk.target)
        assert not self.guest.is_paused()

    def assert_nothing_left(self, operation_id: str) -> None:
        """No job, socket, server, scratch file; the only checkpoint of ours is the newest point's."""
        if self.socket_dir.exists():
            assert list(self.socket_dir.iterdir()) == []
        leftovers = [path.name for path in self.directory.rglob(f".oned-backup-{operation_id}*")]
        assert leftovers == []
        wait_for("end of all processes", lambda: not processes(self.socket_dir), timeout_s=10)
        if self.guest.is_active():
            assert not self.guest.has_backup_job()
        kept = {self.points[-1].exports.checkpoint} if self.points else set()
        own = {name for name in self.checkpoints() if name.startswith(f"odb-{INSTALLATION}-")}
        assert own <= kept

    def checkpoints(self) -> list[str]:
        """What libvirt lists."""
        return sorted(checkpoint.getName() for checkpoint in self.guest.domain.listAllCheckpoints(0))

    def _store(self, point: RestorePoint) -> None:
        """Read every export into a file, as a datastore does, and note the chain."""
        for disk in point.exports.disks:
            path = point.files / disk.file
            blocks = Path(f"{path}.blocks")
            if not disk.path:
                with open_export(disk.nbd_socket, disk.nbd_export, dirty_bitmap=disk.dirty_bitmap) as image:
                    path.write_bytes(b"".join(bytes(chunk) for chunk in image.chunks()))
                    blocks.write_bytes(b"".join(bytes(piece) for piece in image.blocks_bytes()))
            layer = Layer(path, blocks, disk.file)
            if disk.type is BackupType.FULL:
                self._layers[disk.target] = [layer]
            else:
                self._layers[disk.target] = [*self._layers[disk.target], layer]
            point.layers[disk.target] = tuple(self._layers[disk.target])

    @contextmanager
    def _same_instant(self, name: str, *, suspended: bool) -> Iterator[dict[str, Path]]:
        """Copies of all disks by QEMU, of the instant at which the block runs."""
        truth: dict[str, Path] = {}
        if suspended:
            was_paused = self.guest.is_paused()
            self.guest.suspend()
            try:
                truth.update(self.guest.push_copy(self.directory / f"truth-{name}"))
                yield truth
            finally:
                if not was_paused:
                    self.guest.resume()
        elif not self.guest.is_active():
            for target, disk in self.guest.writable_disks().items():
                truth[target] = self.directory / f"truth-{name}-{target}"
                command("qemu-img", "convert", "-O", "qcow2", str(disk.path), str(truth[target]))
            yield truth
        else:
            yield truth

    def _run(
        self,
        kind: Kind,
        name: str,
        action: str,
        request: Request,
        invocation: Invocation,
        *,
        limits: Limits = LIMITS,
    ) -> dict[str, str]:
        driver = find_driver([DRIVERS], kind, name)
        return run_action(
            driver,
            action,
            request,
            invocation,
            limits=limits,
            log=lambda level, line: self.log.append(f"<{level}> {line}"),
        )

    def _invocation(self, **fields: Any) -> Invocation:
        work = self.directory / "work"
        work.mkdir(exist_ok=True)
        return Invocation(work, environment=self.environment, **fields)


def command(*argv: str) -> str:
    """What a program prints; it must succeed."""
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120).stdout


def compare(restored: Path, truth: Path) -> None:
    """Both images have the same content and size."""
    said = command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(restored), str(truth))
    assert said == "Images are identical.\n"


def processes(socket_dir: Path) -> list[str]:
    """The servers and watchmen that we have started for operations below the directory."""
    ours = ("qemu-nbd", "oned_backup.transfer.guard")
    lines = command("ps", "-ewwo", "args").splitlines()
    return [line for line in lines if str(socket_dir) in line and any(name in line for name in ours)]


def new_file(guest: Guest, path: str, mib: int) -> None:
    """Write random data in the guest, and have it on the disk."""
    guest.shell(f"dd if=/dev/urandom of={path} bs=1M count={mib} 2>/dev/null; sync")


def _host(guest: Guest, uri: str) -> Host:
    host = new_host(0, name="lab", uri=uri or guest.uri)
    return with_paths(host, {"SWTPM_DIR": str(guest.libvirtd.swtpm_dir)})
