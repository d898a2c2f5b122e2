"""A disk that is restored into an NBD server: what the server has afterwards is judged by QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oned_backup.disk.chain import Layer
from oned_backup.disk.restore import restore_chain
from oned_backup.disk.target import NbdExport, parse_target
from oned_backup.errors import DataCorrupt, InvalidInput, NoSpace, Unavailable

from .conftest import Qemu, running

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture
def layers(qemu: Qemu) -> tuple[list[Layer], Path]:
    """A full and an increment that zeroes some of it, and the disk they are of."""
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, str(SIZE))
    qemu.io(disk, "write -P 1 1M 9M", "write -P 2 40M 3M")
    full = qemu.back_up(disk, "f0")
    qemu.img("bitmap", "--add", disk, "b")
    qemu.io(disk, "write -z 2M 1M", "write -P 3 50M 100k")
    return [full, qemu.back_up(disk, "f1", bitmap="b")], disk


@contextmanager
def served(qemu: Qemu, image: Path, fmt: str, *, clients: int = 8) -> Iterator[NbdExport]:
    socket = qemu.folder / "target.sock"
    argv = ["qemu-nbd", "-t", "-e", str(clients), "-x", "disk 0", "-k", str(socket), "-f", fmt]
    with running([*argv, str(image)], socket):
        yield NbdExport(str(socket), "disk 0")


@pytest.mark.parametrize("clients", [1, 8])
@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_a_new_image_takes_no_more_than_the_data(
    qemu: Qemu, layers: tuple[list[Layer], Path], fmt: str, clients: int
) -> None:
    chain, disk = layers
    target = qemu.folder / "target"
    qemu.img("create", "-q", "-f", fmt, target, str(SIZE))
    with served(qemu, target, fmt, clients=clients) as export:
        restored = restore_chain(chain, export, format="raw")
    qemu.same(target, fmt, disk, "qcow2")
    assert restored.bytes_written < 13 * MIB
    assert target.stat().st_blocks * 512 < 14 * MIB


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_nothing_is_left_of_what_was_there(qemu: Qemu, layers: tuple[list[Layer], Path], fmt: str) -> None:
    """The server's disk is larger than ours; what lies beyond stays."""
    chain, disk = layers
    target = qemu.folder / "target"
    qemu.img("create", "-q", "-f", fmt, target, str(SIZE + MIB))
    qemu.io(target, f"write -P 0xaa 0 {SIZE + MIB}", fmt=fmt)
    with served(qemu, target, fmt) as export:
        restore_chain(chain, export, format="raw")
    raw = qemu.folder / "raw"
    qemu.img("convert", "-O", "raw", disk, raw)
    qemu.img("convert", "-f", fmt, "-O", "raw", target, qemu.folder / "flat")
    flat = (qemu.folder / "flat").read_bytes()
    assert flat[:SIZE] == raw.read_bytes()
    assert flat[SIZE:] == b"\xaa" * MIB


def test_a_qcow2_file_into_a_raw_export(qemu: Qemu, layers: tuple[list[Layer], Path]) -> None:
    chain, disk = layers
    target = qemu.folder / "target"
    qemu.img("create", "-q", "-f", "raw", target, str(SIZE))
    with served(qemu, target, "raw") as export:
        restore_chain(chain, export, format="qcow2")
    qemu.same(target, "qcow2", disk, "qcow2")


def test_a_server_that_cannot_zero_gets_zeros(qemu: Qemu, layers: tuple[list[Layer], Path]) -> None:
    chain, disk = layers
    target = qemu.folder / "target"
    target.write_bytes(b"\xaa" * SIZE)
    with qemu.nbdkit("--filter=nozero", "file", target, "zeromode=none") as socket:
        restore_chain(chain, NbdExport(socket), format="raw")
    qemu.same(target, "raw", disk, "qcow2")


def test_a_server_that_is_too_small_is_left_alone(qemu: Qemu, layers: tuple[list[Layer], Path]) -> None:
    chain, _ = layers
    target = qemu.folder / "target"
    target.write_bytes(b"\xaa" * MIB)
    with (
        served(qemu, target, "raw") as export,
        pytest.raises(InvalidInput, match=rf"{SIZE} bytes needed, the export has {MIB}"),
    ):
        restore_chain(chain, export, format="raw")
    assert target.read_bytes() == b"\xaa" * MIB


def test_a_server_that_fails_or_is_absent_is_named(qemu: Qemu, layers: tuple[list[Layer], Path]) -> None:
    chain, _ = layers
    with pytest.raises(Unavailable, match="NBD export"):
        restore_chain(chain, NbdExport(str(qemu.folder / "none")), format="raw")
    with (
        qemu.nbdkit(
            "--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC", "error-pwrite-rate=50%"
        ) as socket,
        pytest.raises(NoSpace, match="NBD export"),
    ):
        restore_chain(chain, NbdExport(socket), format="raw")
    with (
        qemu.nbdkit(
            "--filter=exitlast", "--filter=error", "memory", str(SIZE), "error-pwrite=EIO", "error-rate=100%"
        ) as socket,
        pytest.raises(Unavailable, match="NBD export"),
    ):
        restore_chain(chain, NbdExport(socket), format="raw")


def test_an_export_has_a_name_in_one_piece() -> None:
    export = NbdExport("/run/a b/c?d&e=f.sock", "disk #0/ä")
    assert parse_target(str(export)) == export
    assert parse_target("/srv/disk?socket=x") == Path("/srv/disk?socket=x")
    for text in (
        "",
        "disk",
        "nbd://host/x",
        "nbd+unix:///x",
        "nbd+unix://h/x?socket=/s",
        "nbd+unix:///x?socket=s",
    ):
        with pytest.raises(InvalidInput, match="neither an absolute path nor"):
            parse_target(text)


def test_what_is_lost_is_zero_in_the_export_too(qemu: Qemu, layers: tuple[list[Layer], Path]) -> None:
    chain, disk = layers
    damaged = qemu.folder / "damaged"
    data = bytearray(chain[1].path.read_bytes())
    data[-1] ^= 1  # the last cluster: 100 KiB at 50 MiB
    damaged.write_bytes(data)
    lost = [chain[0], Layer(damaged, chain[1].blocks, "damaged")]
    target = qemu.folder / "target"
    qemu.img("create", "-q", "-f", "qcow2", target, str(SIZE))
    qemu.io(target, f"write -P 0xaa 0 {SIZE}")
    with served(qemu, target, "qcow2") as export:
        with pytest.raises(DataCorrupt, match="damaged"):
            restore_chain(lost, export, format="raw")
        restored = restore_chain(lost, export, format="raw", salvage=True)
    ((offset, length),) = restored.salvaged
    assert 50 * MIB <= offset < offset + length <= 50 * MIB + (128 << 10)
    qemu.io(disk, f"write -z {offset} {length}")
    qemu.same(target, "qcow2", disk, "qcow2")
