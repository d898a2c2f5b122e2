"""Chains made by a real QEMU: every restore point reads back exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oned_backup.disk.chain import ChainReader, Layer, merge_ranges
from oned_backup.disk.restore import restore_chain
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.errors import InvalidInput, NotFound

TIB = 1 << 40
SIZES = [512, CLUSTER - 512, CLUSTER, 10 * CLUSTER + 1024, 600 << 20, 8 * TIB - 512]

operation = st.tuples(
    st.sampled_from(["write", "write", "write -z", "discard", "write -z -u"]),
    st.sampled_from([0, 0.3, 0.5, 0.999, 1]),  # where on the disk
    st.integers(0, 40),  # and how far from there, in units of 4 KiB
    st.integers(1, 60),  # length in units of 4 KiB, or of 512 bytes on small disks
    st.integers(1, 255),
)
epoch = st.lists(operation, min_size=1, max_size=6)


def commands(size: int, operations: list[tuple[str, float, int, int, int]]) -> list[str]:
    unit = 4096 if size > 1 << 20 else 512
    result = []
    for verb, place, shift, length, pattern in operations:
        offset = min(int(size * place) // 512 * 512 + shift * unit, size - 512)
        count = min(length * unit, size - offset)
        options = f"-P {pattern} " if verb == "write" else ""
        result.append(f"{verb} {options}{offset} {count}")
    return result


@settings(max_examples=12)
@given(
    size=st.sampled_from(SIZES),
    epochs=st.lists(epoch, min_size=2, max_size=4),
    grow=st.booleans(),
    fmt=st.sampled_from(["raw", "qcow2"]),
)
def test_every_point_of_a_chain_reads_back_exactly(
    qemu, size: int, epochs: list[list[tuple[str, float, int, int, int]]], grow: bool, fmt: str
) -> None:
    if size > TIB:
        fmt = "qcow2"  # a raw file of that size is beyond some file systems
    for stale in qemu.folder.iterdir():
        stale.unlink()
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, str(size))
    layers: list[Layer] = []
    for number, operations in enumerate(epochs):
        qemu.io(disk, *commands(size, operations))
        bitmap = f"b{number - 1}" if number else ""
        layers.append(qemu.back_up(disk, f"f{number}", bitmap=bitmap))
        shutil.copy(disk, qemu.folder / f"then{number}")
        qemu.img("bitmap", "--add", disk, f"b{number}")
        if grow and number == 1:
            size += 3 * CLUSTER + 512
            qemu.img("resize", "-q", disk, str(size))
    for number in range(len(epochs)):
        restored = qemu.folder / f"restored{number}"
        assert restore_chain(layers[: number + 1], restored, format=fmt).salvaged == ()
        then = qemu.folder / f"then{number}"
        qemu.same(restored, fmt, then, "qcow2")
        assert info_size(qemu, restored, fmt) == info_size(qemu, then, "qcow2")


def info_size(qemu, image: Path, fmt: str) -> str:
    return next(line for line in qemu.img("info", "-f", fmt, image).splitlines() if "virtual size" in line)


def made(qemu, name: str, size: int, *writes: str) -> Layer:
    path = qemu.folder / name
    qemu.img("create", "-q", "-f", "qcow2", path, str(size))
    if writes:
        qemu.io(path, *writes)
    return Layer(path, None, name)


def read(layers: list[Layer]) -> bytes:
    with ChainReader(layers) as chain:
        data = bytearray(chain.guest_bytes)
        chain.read_into(0, memoryview(data))
        return bytes(data)


def test_what_a_smaller_layer_cut_off_never_comes_back(qemu) -> None:
    wide = made(qemu, "wide", 4 * CLUSTER, f"write -P 1 0 {4 * CLUSTER}")
    narrow = made(qemu, "narrow", CLUSTER + 512, "write -P 2 0 512")
    again = made(qemu, "again", 3 * CLUSTER)
    assert read([wide, narrow]) == (b"\2" * 512).ljust(CLUSTER, b"\0") + b"\1" * 512
    assert read([wide, narrow, again])[CLUSTER : CLUSTER + 513] == b"\1" * 512 + b"\0"
    assert not any(read([wide, narrow, again])[CLUSTER + 512 :])


@pytest.mark.parametrize("cluster_size", [512, 4096, 2 << 20])
def test_layers_that_qemu_wrote_with_other_clusters(qemu, cluster_size: int) -> None:
    base = made(qemu, "base", 9 << 20, "write -P 1 0 9M")
    path = qemu.folder / "top"
    qemu.img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster_size}", path, str(9 << 20))
    qemu.io(path, "write -P 2 4M 2k", "write -z 6M 2M", "write -P 3 9436672 512")
    # the judge: QEMU's own view of the same chain
    view = qemu.folder / "view"
    shutil.copy(path, view)
    qemu.img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", base.path, view)
    restore_chain([base, Layer(path, None, "top")], qemu.folder / "raw", format="raw")
    qemu.same(qemu.folder / "raw", "raw", view, "qcow2")


def test_the_merged_data_is_what_does_not_read_as_zero(qemu) -> None:
    base = made(qemu, "base", 8 * CLUSTER, f"write -P 1 0 {8 * CLUSTER}")
    top = made(qemu, "top", 8 * CLUSTER, f"write -z {2 * CLUSTER} {CLUSTER}")
    with ChainReader([base, top]) as chain:
        assert chain.data() == Spans.of((0, 2), (3, 8))


def test_reading_a_chain_changes_none_of_its_files(qemu) -> None:
    layers = [made(qemu, "base", 1 << 20, "write -P 1 0 1M"), made(qemu, "top", 1 << 20, "write -P 2 0 64k")]
    before = [(layer.path.read_bytes(), layer.path.stat().st_mtime_ns) for layer in layers]
    for layer in layers:
        layer.path.chmod(0o400)
    restore_chain(layers, qemu.folder / "raw", format="raw")
    assert [(layer.path.read_bytes(), layer.path.stat().st_mtime_ns) for layer in layers] == before


def test_a_chain_without_layers_or_with_one_missing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no layers"):
        ChainReader([])
    with pytest.raises(NotFound, match=r"disk\.0\.3: no such file"):
        ChainReader([Layer(tmp_path / "disk.0.3", None, "disk.0.3")])


def test_ranges_that_touch_become_one() -> None:
    assert merge_ranges([(8, 9), (0, 4), (4, 6), (5, 5), (1, 2)]) == ((0, 6), (8, 1))
