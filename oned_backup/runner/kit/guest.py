"""Disks of a made-up guest at several points in time, and the exports that a backup reads.

Every point keeps its own copy of each disk: the qcow2 image with the dirty bitmap
of what changed since the point before, the raw bytes to compare with, and for
drivers that want staged files the file that OpenNebula would hand over. QEMU's
tools make all of it, so nothing here shares a mistake with what is judged.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oned_backup.contract import companions
from oned_backup.contract.exports import DiskExport, Exports, Reason, disk_file_name
from oned_backup.errors import Unavailable
from oned_backup.model.increments import BackupType

KIB = 1024
MIB = 1024 * KIB

VM_XML = """<VM>
  <ID>7</ID>
  <NAME>büro "alpha" &amp; $(touch odd); -rf</NAME>
  <TEMPLATE><OS><UUID><![CDATA[6a1f6e3c-0d0c-4c9b-8a6e-2f0f3f6f7a10]]></UUID></OS>\t</TEMPLATE>
</VM>

"""
SMALL_FILES = {
    companions.VM_XML: VM_XML.encode(),
    companions.DOMAIN_XML: b"<domain type='kvm'><name>b\xc3\xbcro</name></domain>",
    companions.NVRAM: bytes(range(256)) * 64,
}


@dataclass(frozen=True)
class Disk:
    """One disk at one point."""

    disk_id: int
    size_bytes: int
    type: BackupType
    image: Path
    bitmap: str
    staged: Path
    reference: Path

    @property
    def target(self) -> str:
        """Its name in the guest."""
        return f"vd{self.disk_id}"


@dataclass(frozen=True)
class Point:
    """All disks at one moment."""

    disks: tuple[Disk, ...]


def make_points(
    directory: Path,
    disks: Sequence[tuple[int, Sequence[Sequence[str] | None]]],
    *,
    restarts: Sequence[tuple[int, int]] = (),
) -> tuple[Point, ...]:
    """The points of a guest: for each disk its size and, for each point, the qemu-io commands before it.

    None in place of commands: the guest does not have the disk at that point. The command
    `grow BYTES` makes the disk larger first. `restarts`: (disk, point) pairs that are FULL
    inside an increment.
    """
    directory.mkdir()
    columns = [
        _make_disk(directory, disk_id, size, steps, {p for d, p in restarts if d == disk_id})
        for disk_id, (size, steps) in enumerate(disks)
    ]
    rows = zip(*columns, strict=True)
    return tuple(Point(tuple(disk for disk in disks if disk is not None)) for disks in rows)


def _make_disk(
    directory: Path, disk_id: int, size: int, steps: Sequence[Sequence[str] | None], fulls: set[int]
) -> list[Disk | None]:
    live = directory / f"live.{disk_id}.qcow2"
    _run("qemu-img", "create", "-q", "-f", "qcow2", live, size)
    made: list[Disk | None] = []
    for number, commands in enumerate(steps):
        if commands is None:
            made.append(None)
            continue
        stem = f"disk{disk_id}-point{number}"
        before = made[-1] if made else None
        size = next((int(c.split()[1]) for c in commands if c.startswith("grow ")), size)
        disk = Disk(
            disk_id,
            size,
            BackupType.FULL if before is None or number in fulls else BackupType.INCREMENT,
            image=directory / f"{stem}.qcow2",
            bitmap=f"since{number - 1}",
            staged=directory / f"{stem}.staged",
            reference=directory / f"{stem}.raw",
        )
        _write(live, commands)
        if before is not None:
            _run("qemu-img", "bitmap", "--disable", "-f", "qcow2", live, disk.bitmap)
        shutil.copyfile(live, disk.image)
        if number + 1 < len(steps):
            _run("qemu-img", "bitmap", "--add", "-f", "qcow2", live, f"since{number}")
        _run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk.image, disk.reference)
        if before is None or disk.type is BackupType.FULL:
            _run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", disk.image, disk.staged)
        else:
            _run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", before.image, disk.staged)
            _write(disk.staged, commands)
            _run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", disk.staged)
        made.append(disk)
    live.unlink()
    return made


def _write(image: Path, commands: Sequence[str]) -> None:
    for command in commands:
        if command.startswith("grow "):
            _run("qemu-img", "resize", "-q", "-f", "qcow2", image, command.split()[1])
    written = [command for command in commands if not command.startswith("grow ")]
    if written:
        _run("qemu-io", "-f", "qcow2", *(word for command in written for word in ("-c", command)), image)


@contextlib.contextmanager
def exported(point: Point, directory: Path, *, increment_id: int, stream: bool) -> Iterator[Exports]:
    """The EXPORTS document of `point`, served over NBD while inside, or staged in `directory`/files.

    `directory`/files is the ODB_SOURCE_DIR. `increment_id` 0: everything FULL.
    """
    files = directory / "files"
    files.mkdir(parents=True)
    for name, content in SMALL_FILES.items():
        (files / name).write_bytes(content)
    nbd_socket = directory / "nbd.sock"
    exports = []
    for disk in point.disks:
        is_full = increment_id == 0 or disk.type is BackupType.FULL
        file = disk_file_name(disk.disk_id, increment_id)
        if not stream:
            shutil.copyfile(disk.staged, files / file)
        exports.append(
            DiskExport(
                disk_id=disk.disk_id,
                target=disk.target,
                file=file,
                type=BackupType.FULL if is_full else BackupType.INCREMENT,
                reason=_reason(increment_id, is_full=is_full),
                size_bytes=disk.size_bytes,
                format="qcow2",
                source=f"/srv/vm/{disk.target}.qcow2",
                nbd_socket=str(nbd_socket) if stream else "",
                nbd_export=disk.target if stream else "",
                dirty_bitmap="" if is_full or not stream else disk.bitmap,
                path="" if stream else str(files / file),
            )
        )
    document = Exports(tuple(exports), increment_id=increment_id, files=tuple(SMALL_FILES))
    with _server(point, document, nbd_socket, directory) if stream else contextlib.nullcontext():
        yield document


def _reason(increment_id: int, *, is_full: bool) -> Reason:
    if not is_full:
        return Reason.INCREMENT
    return Reason.BITMAP_MISSING if increment_id else Reason.FIRST_BACKUP


@contextlib.contextmanager
def _server(point: Point, exports: Exports, path: Path, directory: Path) -> Iterator[None]:
    """One NBD server with an export a disk, as a hypervisor's backup job has it."""
    argv = [
        "qemu-storage-daemon",
        "--nbd-server",
        json.dumps({"addr": {"type": "unix", "path": str(path)}, "max-connections": 0}),
    ]
    for disk, export in zip(point.disks, exports.disks, strict=True):
        node = f"disk{disk.disk_id}"
        file = {"driver": "file", "filename": str(disk.image), "read-only": True}
        blockdev = {"driver": "qcow2", "node-name": node, "read-only": True, "file": file}
        served = {"type": "nbd", "id": node, "node-name": node, "name": disk.target}
        bitmaps = [export.dirty_bitmap] if export.dirty_bitmap else []
        argv += ["--blockdev", json.dumps(blockdev), "--export", json.dumps({**served, "bitmaps": bitmaps})]
    with (directory / "nbd.log").open("wb") as log:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _await_socket(path, process, directory / "nbd.log")
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def exported_for_writing(image: Path, image_format: str, directory: Path) -> Iterator[str]:
    """The NBD URI of a server that writes to an image."""
    path = directory / "write.sock"
    argv = ["qemu-nbd", "--persistent", "--shared=8", f"--socket={path}", "--export-name=disk"]
    with (directory / "write.log").open("wb") as log:
        process = subprocess.Popen(
            [*argv, f"--format={image_format}", str(image)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        _await_socket(path, process, directory / "write.log")
        yield f"nbd+unix:///disk?socket={path}"
    finally:
        process.terminate()
        process.wait()


def _await_socket(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.connect(str(path))
            return
        time.sleep(0.005)
    raise Unavailable(f"the NBD server has nothing at {path}: {log.read_text()[-400:]}")


def image_problem(image: Path, reference: Path) -> str:
    """What is wrong with a restored qcow2 image, empty if nothing is: judged by qemu-img."""
    for argv in (
        ("qemu-img", "check", "-q", "-f", "qcow2", image),
        ("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, reference),
    ):
        done = subprocess.run([str(word) for word in argv], capture_output=True, timeout=300, check=False)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
            return f"{' '.join(map(str, argv))}: {said}"
    return ""


def raw_problem(raw: Path, reference: Path) -> str:
    """Where a restored raw disk differs from `reference`, empty if nowhere."""
    sizes = raw.stat().st_size, reference.stat().st_size
    with raw.open("rb") as one, reference.open("rb") as other:
        offset = 0
        while True:
            ours, theirs = one.read(MIB), other.read(MIB)
            if ours != theirs:
                pairs = enumerate(zip(ours, theirs, strict=False))
                first = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
                return f"byte {offset + first} differs (sizes: {sizes[0]}, should be {sizes[1]})"
            if not ours:
                return ""
            offset += len(ours)


def _run(*argv: object) -> None:
    done = subprocess.run([str(word) for word in argv], capture_output=True, timeout=300, check=False)
    if done.returncode != 0:
        raise Unavailable(f"{argv[0]}: {done.stderr.decode('utf-8', 'replace').strip()}")
