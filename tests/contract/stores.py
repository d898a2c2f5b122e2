"""Datastore drivers with real disks behind qemu-nbd, called by the runner that a daemon uses.

store = make_store(directory, driver, {"BASE_PATH": …})
with disk.served() as socket:
    store.backup("20260101-000000-aaaaaa", exports_of(export(disk, socket)))
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from waiting import wait_for

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.documents import Catalogue, Listing, RestorePlan, VerifyReport
from oned_backup.contract.exports import DiskExport, Exports, Reason, disk_file_name
from oned_backup.contract.request import Backup, Request
from oned_backup.contract.result import document
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import Manifest, parse_manifest
from oned_backup.runner.drivers import load_driver
from oned_backup.runner.run import Cancellation, Invocation, Limits, run_action

MIB = 1 << 20
VM_ID = 7
DATASTORE_ID = 100
LIMITS = Limits(deadline_s=120, inactivity_s=60, grace_s=5)


def run(*argv: object) -> str:
    done = subprocess.run(
        [str(word) for word in argv], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


@dataclass
class Disk:
    """A qcow2 image with dirty bitmaps, written by qemu-io and frozen as raw copies by qemu-img."""

    path: Path
    disk_id: int = 0

    @classmethod
    def create(cls, path: Path, size: int | str, disk_id: int = 0) -> Disk:
        run("qemu-img", "create", "-q", "-f", "qcow2", path, size)
        return cls(path, disk_id)

    def write(self, *commands: str) -> None:
        words = [word for command in commands for word in ("-c", command)]
        run("qemu-io", "-f", "qcow2", *words, self.path)

    def track(self, bitmap: str) -> None:
        run("qemu-img", "bitmap", "-f", "qcow2", "--add", self.path, bitmap)

    def copy_raw(self, target: Path) -> Path:
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", self.path, target)
        return target

    @property
    def size_bytes(self) -> int:
        with self.path.open("rb") as file:
            file.seek(24)
            return int.from_bytes(file.read(8), "big")

    @contextmanager
    def served(self, bitmap: str = "") -> Iterator[str]:
        """The path of a unix socket with the export `disk`."""
        with tempfile.TemporaryDirectory(prefix="odb-", dir="/tmp") as directory:
            socket = Path(directory) / "nbd.sock"
            extra = [f"--bitmap={bitmap}"] if bitmap else []
            process = subprocess.Popen(
                [
                    *("qemu-nbd", "--read-only", "--persistent", "--shared=8", "--format=qcow2"),
                    *("--export-name=disk", f"--socket={socket}", *extra, str(self.path)),
                ]
            )
            try:
                wait_for("socket", lambda: socket.exists() or process.poll() is not None, every_s=0.01)
                assert process.poll() is None, "qemu-nbd ended at once"
                yield str(socket)
            finally:
                process.terminate()
                process.wait(20)


@dataclass
class Store:
    """Calls the driver as the daemon does, and remembers what the daemon would have in its catalogue."""

    #: where the files of the store lie, as the test sees them
    base: Path
    root: Path
    driver: Path
    #: of the datastore, without BASE_PATH
    parameters: Mapping[str, str] = field(default_factory=dict)
    #: further variables of the driver
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = LIMITS
    vm_id: int = VM_ID
    #: backup ids by chain: what BACKUP_INCREMENTS says
    chain: list[str] = field(default_factory=list)
    images_known: bool = True
    #: texts of manifests that the daemon hands to actions on an image
    catalogue_texts: tuple[str, ...] = ()
    logged: list[str] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)

    @property
    def source(self) -> Path:
        return self.root / "source"

    def path(self, backup_id: str) -> Path:
        return self.base / str(self.vm_id) / backup_id

    def names(self) -> set[str]:
        folder = self.base / str(self.vm_id)
        return {entry.name for entry in folder.iterdir()} if folder.exists() else set()

    def call(
        self,
        action: str,
        options: Mapping[str, str] | None = None,
        *,
        backup: Backup | None = None,
        exports: Exports | None = None,
        image: xmldoc.Element | None = None,
        cancellation: Cancellation | None = None,
        stdout_fd: int | None = None,
    ) -> dict[str, str]:
        ids = self.chain
        increments = [
            xmldoc.build(
                "INCREMENT",
                {
                    "DATE": 1,
                    "ID": number,
                    "PARENT_ID": number - 1,
                    "SIZE": 1,
                    "SOURCE": backup_id,
                    "TYPE": "INCREMENT" if number else "FULL",
                },
            )
            for number, backup_id in enumerate(ids)
        ]
        known_image = {
            "ID": 1,
            "SOURCE": ids[0] if ids else "",
            "VMS": {"ID": self.vm_id},
            "BACKUP_INCREMENTS": iter(increments),
        }
        known = {"ID": 1} if self.images_known and self.chain else {}
        request = Request(
            kind=Kind.DATASTORE,
            operation_id="op-0123456789ab",
            operation_kind="test",
            backup=backup,
            vm=xmldoc.build(
                "VM",
                {"ID": self.vm_id, "NAME": "web '1' <&>", "TEMPLATE": {"OS": {"UUID": "c0ffee00-0000"}}},
            ),
            datastore=xmldoc.build(
                "DATASTORE",
                {
                    "ID": DATASTORE_ID,
                    "TEMPLATE": {**self.parameters, "BASE_PATH": str(self.base)},
                    "IMAGES": known,
                },
            ),
            image=image
            if image is not None or exports is not None or not ids
            else xmldoc.build("IMAGE", known_image),
            exports=exports,
            catalogue=Catalogue(self.catalogue_texts) if self.catalogue_texts else None,
            options=options or {},
        )
        return run_action(
            load_driver(self.driver),
            action,
            request,
            Invocation(self.root, source_dir=self.source, secrets=self.secrets, environment=self.environment),
            limits=self.limits,
            cancellation=cancellation,
            log=lambda _, line: self.logged.append(line),
            progress=lambda done, total: self.progress.append((done, total)),
            stdout_fd=stdout_fd,
        )

    def backup(
        self,
        backup_id: str,
        exports: Exports,
        *,
        parent: str = "",
        options: Mapping[str, str] | None = None,
        cancellation: Cancellation | None = None,
    ) -> dict[str, str]:
        chain_id = self.chain[0] if parent else backup_id
        place = Backup(
            id=backup_id,
            chain_id=chain_id,
            increment_id=exports.increment_id,
            date=1_800_000_000,
            parent_id=parent,
            checkpoint=exports.checkpoint,
        )
        answer = self.call("backup", options, backup=place, exports=exports, cancellation=cancellation)
        if backup_id not in self.chain:
            self.chain.append(backup_id)
        return answer

    def cancel(self, backup_id: str) -> None:
        self.call("backup_cancel", backup=Backup(id=backup_id, chain_id=backup_id, increment_id=0, date=1))

    def manifest(self, backup_id: str) -> Manifest:
        return parse_manifest((self.path(backup_id) / "manifest.json").read_bytes())

    def ls(self, **options: str) -> Listing:
        return Listing.from_xml(document(self.call("ls", options), "LISTING"))

    def plan(self, **options: str) -> RestorePlan:
        return RestorePlan.from_xml(document(self.call("restore", options), "PLAN"))

    def verify(self, **options: str) -> VerifyReport:
        return VerifyReport.from_xml(document(self.call("verify", options), "REPORT"))

    def catalogue(self) -> Catalogue:
        return Catalogue.from_xml(document(self.call("catalogue"), "CATALOGUE"))

    def failures(self, **options: str) -> dict[str, dict[str, str]]:
        return {backup.backup_id: dict(backup.failures) for backup in self.verify(**options).backups}

    def url(self, increment: int = -1, disk_id: int = 0) -> str:
        disks = {disk.disk_id: disk.url for disk in self.ls(INCREMENT_ID=str(increment)).disks}
        return disks[disk_id]

    def download(self, url: str, target: Path | None = None, **options: str) -> bytes:
        """The raw disk; by way of standard output where no target is given."""
        if target is not None:
            self.call("download", {"URL": url, "TARGET": str(target), **options})
            return target.read_bytes()
        read, write = os.pipe()
        with os.fdopen(read, "rb") as reader:
            received: list[bytes] = []
            thread = threading.Thread(target=lambda: received.append(reader.read()))
            thread.start()
            try:
                self.call("download", {"URL": url, **options}, stdout_fd=write)
            finally:
                os.close(write)
                thread.join(60)
        return received[0]


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Run `action` beside the block, and raise what it raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:  # noqa: BLE001 - for the test's thread
            raised.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    try:
        yield
    finally:
        thread.join(90)
        if raised:
            raise raised[0]


def export(disk: Disk, socket: str, increment: int = 0, bitmap: str = "") -> DiskExport:
    return DiskExport(
        disk_id=disk.disk_id,
        target=f"vd{chr(97 + disk.disk_id)}",
        file=disk_file_name(disk.disk_id, increment),
        type=BackupType.INCREMENT if bitmap else BackupType.FULL,
        reason=Reason.INCREMENT if bitmap else Reason.FIRST_BACKUP,
        size_bytes=disk.size_bytes,
        format="qcow2",
        source=str(disk.path),
        nbd_socket=socket,
        nbd_export="disk",
        dirty_bitmap=bitmap,
    )


def exports_of(
    *disks: DiskExport, increment: int = 0, files: tuple[str, ...] = ("vm.xml", "nvram.fd")
) -> Exports:
    return Exports(disks=disks, increment_id=increment, checkpoint="odb-0badcafe-x", files=files)


def staged(disk: DiskExport, path: Path) -> DiskExport:
    return replace(disk, path=str(path), nbd_socket="", nbd_export="")


@dataclass
class Chain:
    """A store with a full backup and two increments of one disk, and what each must restore to."""

    store: Store
    expected: list[bytes]


def make_store(root: Path, driver: Path, parameters: Mapping[str, str] | None = None) -> Store:
    """An empty store in `root`, and the small files of a backup beside it."""
    made = Store(root / "store", root, driver, parameters or {})
    made.base.mkdir()
    made.source.mkdir()
    (made.source / "vm.xml").write_text("<VM><NAME>web</NAME></VM>")
    (made.source / "nvram.fd").write_bytes(os.urandom(3000))
    return made


def make_disk(root: Path) -> Disk:
    """20 MiB, some of it written."""
    made = Disk.create(root / "disk.qcow2", "20M")
    made.write("write -P 1 0 3M", "write -P 2 5M 100k", "write -P 3 19900k 80k")
    return made


def make_chain(store: Store) -> Chain:
    """A full backup and two increments of such a disk in `store`."""
    disk = make_disk(store.root)
    expected = []
    changes: list[tuple[str, ...]] = [
        (),
        ("write -P 9 1M 200k", "write -z 5M 64k", "write -P 4 10M 1k"),
        ("write -P 8 1100k 10k", "discard 2M 512k"),
    ]
    for number, commands in enumerate(changes):
        if commands:
            disk.write(*commands)
        bitmap = f"b{number - 1}" if number else ""
        with disk.served(bitmap) as socket:
            one = export(disk, socket, number, bitmap)
            parent = store.chain[-1] if store.chain else ""
            store.backup(f"20260101-00000{number}-aaaaaa", exports_of(one, increment=number), parent=parent)
        disk.track(f"b{number}")
        expected.append(disk.copy_raw(store.root / "copy.raw").read_bytes())
    return Chain(store, expected)


def copy_chain(made: Chain, root: Path) -> Chain:
    """A copy to damage, in `root`."""
    for name in ("store", "source"):
        shutil.copytree(made.store.root / name, root / name)
    copied = replace(
        made.store, base=root / "store", root=root, chain=list(made.store.chain), logged=[], progress=[]
    )
    return Chain(copied, made.expected)
