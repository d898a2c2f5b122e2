"""One flipped bit anywhere: found, named, and the rest salvaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oned_backup.disk.chain import Layer
from oned_backup.disk.restore import restore_chain
from oned_backup.disk.scrub import verify_blocks
from oned_backup.disk.spans import CLUSTER
from oned_backup.errors import DataCorrupt, NotFound

MIB = 1 << 20
GIB = 1 << 30
SIZE = 2 * GIB


@pytest.fixture
def chain(qemu) -> list[Layer]:
    """The full has random data at 0, 1 MiB and 1 GiB; the increment a cluster at 1 MiB."""
    raw = qemu.folder / "raw"
    raw.touch()
    os.truncate(raw, SIZE)
    with raw.open("r+b") as file:
        for offset, length in ((0, 128 << 10), (MIB, MIB), (GIB, MIB)):
            file.seek(offset)
            file.write(os.urandom(length))
    disk = qemu.folder / "d"
    qemu.img("convert", "-O", "qcow2", raw, disk)
    full = qemu.back_up(disk, "disk.0.0")
    qemu.img("bitmap", "--add", disk, "b")
    qemu.io(disk, f"write -P 7 {MIB} 64k")
    layers = [full, qemu.back_up(disk, "disk.0.1", bitmap="b")]
    restore_chain(layers, qemu.folder / "good", format="raw")
    return layers


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def refused(qemu, layers: list[Layer], match: str) -> None:
    for fmt in ("raw", "qcow2"):
        with pytest.raises(DataCorrupt, match=match):
            restore_chain(layers, qemu.folder / "restored", format=fmt)
        assert not (qemu.folder / "restored").exists()


def salvaged(qemu, layers: list[Layer]) -> tuple[tuple[int, int], ...]:
    """The lost ranges, after a look that they are zeros and all else is right."""
    target = qemu.folder / "salvaged"
    target.unlink(missing_ok=True)
    lost = restore_chain(layers, target, format="raw", salvage=True).salvaged
    with target.open("rb") as found, (qemu.folder / "good").open("rb") as good:
        for start in (0, GIB // 2, GIB, SIZE - 4 * MIB):
            found.seek(start)
            good.seek(start)
            expected = bytearray(good.read(4 * MIB))
            for offset, length in lost:
                first, end = max(0, offset - start), min(len(expected), offset + length - start)
                if first < end:
                    expected[first:end] = bytes(end - first)
            assert found.read(4 * MIB) == expected
    return lost


# the full's clusters: 0 header, 1 refcount table, 2 its block, 3 L1, 4 and 5 L2,
# 6 and 7 the data at 0, 8 to 23 that at 1 MiB, 24 to 39 that at 1 GiB
def test_a_data_cluster(qemu, chain: list[Layer]) -> None:
    flip(chain[0].path, 7 * CLUSTER + 100)
    refused(qemu, chain, rf"disk\.0\.0: guest bytes {CLUSTER} to {2 * CLUSTER} \(file offset {7 * CLUSTER}\)")
    assert salvaged(qemu, chain) == ((CLUSTER, CLUSTER),)


def test_a_data_cluster_that_a_newer_layer_hides_does_no_harm(qemu, chain: list[Layer]) -> None:
    flip(chain[0].path, 8 * CLUSTER)
    assert salvaged(qemu, chain) == ()
    restore_chain(chain, qemu.folder / "whole", format="raw")
    refused(qemu, chain[:1], f"guest bytes {MIB} to {MIB + CLUSTER}")


def test_a_map_that_forgets_or_moves_a_cluster(qemu, chain: list[Layer]) -> None:
    flip(chain[0].path, 4 * CLUSTER + 5)
    refused(
        qemu,
        chain,
        rf"disk\.0\.0: the L2 table at file offset {4 * CLUSTER}, for guest bytes 0 to {GIB // 2}",
    )
    assert salvaged(qemu, chain) == ((0, MIB), (MIB + CLUSTER, GIB // 2 - MIB - CLUSTER))


def test_the_top_table(qemu, chain: list[Layer]) -> None:
    flip(chain[0].path, 3 * CLUSTER + 8000)
    refused(qemu, chain, r"disk\.0\.0: the L1 table")
    assert salvaged(qemu, chain) == ((0, MIB), (MIB + CLUSTER, SIZE - MIB - CLUSTER))


def test_the_header(qemu, chain: list[Layer]) -> None:
    flip(chain[0].path, 31)
    refused(qemu, chain, r"disk\.0\.0: the header does not match")
    assert salvaged(qemu, chain) == ((0, MIB), (MIB + CLUSTER, SIZE - MIB - CLUSTER))
    flip(chain[1].path, 31)
    with pytest.raises(DataCorrupt, match="newest layer"):
        restore_chain(chain, qemu.folder / "restored", format="raw", salvage=True)


def test_a_truncated_file(qemu, chain: list[Layer]) -> None:
    os.truncate(chain[0].path, chain[0].path.stat().st_size - 100 * 1024)
    refused(qemu, chain, r"disk\.0\.0: guest bytes")
    assert salvaged(qemu, chain) == ((GIB + MIB - 2 * CLUSTER, 2 * CLUSTER),)


def test_swapped_files(qemu, chain: list[Layer]) -> None:
    mixed = Layer(chain[0].path, chain[1].blocks, "disk.0.0")
    refused(qemu, [mixed], "does not match its checksum")


def test_a_checksum(qemu, chain: list[Layer]) -> None:
    assert chain[0].blocks is not None
    flip(chain[0].blocks, 64 + 16 * 6 + 3)
    refused(qemu, chain, rf"disk\.0\.0: guest bytes 0 to {CLUSTER}")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda blocks: blocks.write_bytes(b"short"), "no checksum file"),
        (lambda blocks: flip(blocks, 2), "not a checksum file"),
        (lambda blocks: flip(blocks, 9), "not a checksum file of version 1"),
        (lambda blocks: os.truncate(blocks, 100), "checksums take"),
        (lambda blocks: blocks.unlink(), "missing"),
    ],
)
def test_a_checksum_file_that_is_none(qemu, chain: list[Layer], damage, match: str) -> None:
    damage(chain[0].blocks)
    refused(qemu, chain, match)


def test_scrub_finds_nothing_in_good_files(chain: list[Layer]) -> None:
    calls: list[tuple[int, int]] = []
    for layer in chain:
        assert layer.blocks is not None
        assert verify_blocks(layer.path, layer.blocks, progress=lambda *call: calls.append(call)) == []
        assert verify_blocks(layer.path, layer.blocks, percent=1) == []
    assert calls[-1][0] == calls[-1][1] > 0


@pytest.mark.parametrize(
    "offset", [0, 1 * CLUSTER, 2 * CLUSTER + 9, 3 * CLUSTER + 100, 7 * CLUSTER, 39 * CLUSTER - 1]
)
def test_scrub_finds_one_bit_wherever_it_is(chain: list[Layer], offset: int) -> None:
    layer = chain[0]
    assert layer.blocks is not None
    flip(layer.path, offset)
    (failure,) = verify_blocks(layer.path, layer.blocks)
    assert (failure.offset, failure.length) == (offset // CLUSTER * CLUSTER, CLUSTER)


def test_scrub_finds_a_wrong_size_and_a_broken_checksum_file(chain: list[Layer]) -> None:
    layer = chain[0]
    assert layer.blocks is not None
    size = layer.path.stat().st_size
    os.truncate(layer.path, size - CLUSTER)
    assert any(
        "its checksums are those of" in failure.text for failure in verify_blocks(layer.path, layer.blocks)
    )
    os.truncate(layer.path, size + 1)
    assert any(
        "its checksums are those of" in failure.text for failure in verify_blocks(layer.path, layer.blocks)
    )
    layer.blocks.write_bytes(b"")
    (failure,) = verify_blocks(layer.path, layer.blocks)
    assert failure.file == str(layer.blocks)


def test_scrub_of_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        verify_blocks(tmp_path / "none", tmp_path / "none.blocks")
