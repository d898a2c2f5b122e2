"""Where a restored disk can be written."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from oned_backup.disk.chain import Layer
from oned_backup.disk.restore import restore_chain
from oned_backup.errors import Conflict, InvalidInput, NoSpace, NotFound

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def chain(qemu) -> tuple[list[Layer], Path]:
    """A full and an increment that zeroes some of it, and the disk they are of."""
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, str(SIZE))
    qemu.io(disk, "write -P 1 1M 5M", "write -P 2 40M 3M")
    full = qemu.back_up(disk, "f0")
    qemu.img("bitmap", "--add", disk, "b")
    qemu.io(disk, "write -z 2M 1M", "write -P 3 50M 100k")
    return [full, qemu.back_up(disk, "f1", bitmap="b")], disk


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_fresh_file_is_sparse_and_private(qemu, chain: tuple[list[Layer], Path], fmt: str) -> None:
    layers, disk = chain
    target = qemu.folder / "target"
    restored = restore_chain(layers, target, format=fmt)
    qemu.same(target, fmt, disk, "qcow2")
    assert restored.bytes_written < 9 * MIB
    assert target.stat().st_blocks * 512 < 10 * MIB
    assert target.stat().st_mode & 0o777 == 0o600
    if fmt == "qcow2":
        assert qemu.img("check", target).startswith("No errors were found")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("old_size", [0, SIZE // 2, SIZE + 12345])
def test_an_existing_file_is_replaced_in_place(
    qemu, chain: tuple[list[Layer], Path], fmt: str, old_size: int
) -> None:
    layers, disk = chain
    target = qemu.folder / "target"
    target.write_bytes(b"x" * old_size)
    inode = target.stat().st_ino
    restore_chain(layers, target, format=fmt)
    qemu.same(target, fmt, disk, "qcow2")
    assert target.stat().st_ino == inode


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_pipe_gets_every_byte(qemu, chain: tuple[list[Layer], Path], fmt: str) -> None:
    layers, disk = chain
    target = qemu.folder / "target"
    reading, writing = os.pipe()
    with target.open("wb") as file:
        cat = subprocess.Popen(["cat"], stdin=reading, stdout=file)
        os.close(reading)
        restored = restore_chain(layers, writing, format=fmt)
        os.close(writing)
        assert cat.wait(timeout=20) == 0
    qemu.same(target, fmt, disk, "qcow2")
    if fmt == "raw":
        assert target.stat().st_size == SIZE
    assert 7 * MIB < restored.bytes_written < 9 * MIB


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    backing = tmp_path / "device"
    backing.write_bytes(b"\xaa" * (SIZE + MIB))
    made = subprocess.run(
        ["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    yield Path(made.stdout.strip())
    subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def test_a_block_device_is_zeroed_where_the_disk_is_zero(
    qemu, chain: tuple[list[Layer], Path], device: Path
) -> None:
    layers, disk = chain
    restore_chain(layers, device, format="raw")
    with device.open("rb") as file:
        on_device = file.read(SIZE)
        beyond = file.read()
    qemu.img("convert", "-O", "raw", disk, qemu.folder / "raw")
    assert on_device == (qemu.folder / "raw").read_bytes()
    assert beyond == b"\xaa" * MIB


def test_a_qcow2_image_on_a_block_device(qemu, chain: tuple[list[Layer], Path], device: Path) -> None:
    layers, disk = chain
    restore_chain(layers, device, format="qcow2")
    qemu.same(device, "qcow2", disk, "qcow2")


def test_a_device_that_is_too_small_is_left_alone(qemu, device: Path) -> None:
    path = qemu.folder / "big"
    qemu.img("create", "-q", "-f", "qcow2", path, str(SIZE + 2 * MIB))
    with pytest.raises(InvalidInput, match=rf"{SIZE + 2 * MIB} bytes needed, the device has {SIZE + MIB}"):
        restore_chain([Layer(path, None, "big")], device, format="raw")
    assert device.read_bytes() == b"\xaa" * (SIZE + MIB)


def test_a_device_that_is_mounted_is_never_the_target(
    qemu, chain: tuple[list[Layer], Path], device: Path, tmp_path: Path
) -> None:
    layers, _ = chain
    subprocess.run(["mkfs.ext4", "-q", device], check=True)
    before = device.read_bytes()
    place = tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-o", "ro", device, place], check=True)
    try:
        with pytest.raises(Conflict, match="mounted"):
            restore_chain(layers, device, format="raw")
    finally:
        subprocess.run(["umount", place], check=True)
    assert device.read_bytes() == before


def test_a_layer_is_never_the_target(qemu, chain: tuple[list[Layer], Path]) -> None:
    layers, _ = chain
    before = layers[0].path.read_bytes()
    alias = qemu.folder / "alias"
    alias.hardlink_to(layers[0].path)
    with pytest.raises(InvalidInput, match="one of the files to restore from"):
        restore_chain(layers, alias, format="raw")
    assert layers[0].path.read_bytes() == before


@pytest.mark.parametrize("read_only", [True, False])
def test_an_image_that_qemu_has_open_is_never_the_target(
    qemu, chain: tuple[list[Layer], Path], *, read_only: bool
) -> None:
    layers, disk = chain
    before = disk.read_bytes()
    pid_file, socket = qemu.folder / "pid", qemu.folder / "nbd.sock"
    argv = ["qemu-nbd", "--fork", f"--pid-file={pid_file}", f"--socket={socket}", "-f", "qcow2"]
    subprocess.run([*argv, *(["--read-only"] if read_only else []), str(disk)], check=True, timeout=20)
    try:
        with pytest.raises(Conflict, match="QEMU has it open"):
            restore_chain(layers, disk, format="qcow2")
        assert disk.stat().st_size == len(before)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_a_full_target_leaves_nothing_behind(qemu, chain: tuple[list[Layer], Path]) -> None:
    layers, _ = chain
    small = qemu.folder / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("no right to mount")
    try:
        for fmt in ("raw", "qcow2"):
            with pytest.raises(NoSpace, match="target"):
                restore_chain(layers, small / "target", format=fmt)
            assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
    assert {thread.name for thread in threading.enumerate()} & {"fill-0", "fill-1"} == set()


def test_targets_that_cannot_be(qemu, chain: tuple[list[Layer], Path]) -> None:
    layers, _ = chain
    with pytest.raises(InvalidInput, match="format 'vmdk'"):
        restore_chain(layers, qemu.folder / "t", format="vmdk")
    with pytest.raises(NotFound):
        restore_chain(layers, qemu.folder / "no" / "t", format="raw")
    with pytest.raises(InvalidInput, match="neither a regular file"):
        restore_chain(layers, Path("/dev/null"), format="raw")
    with pytest.raises(InvalidInput, match="directory"):
        restore_chain(layers, qemu.folder, format="raw")


def test_progress_ends_at_the_total(qemu, chain: tuple[list[Layer], Path]) -> None:
    layers, _ = chain
    for fmt in ("raw", "qcow2"):
        calls: list[tuple[int, int]] = []
        restore_chain(
            layers, qemu.folder / fmt, format=fmt, progress=lambda *call, calls=calls: calls.append(call)
        )
        assert calls == sorted(calls)
        assert calls[-1][0] == calls[-1][1] > 7 * MIB
