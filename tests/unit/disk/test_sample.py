"""What a sample of a disk tells of its dirty bitmap, with QEMU as the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from oned_backup.disk import sample
from oned_backup.disk.nbdsource import NbdSource
from oned_backup.errors import InvalidInput

MIB = 1 << 20


@contextmanager
def served(qemu, disk: Path, *, bitmap: str = "") -> Iterator[NbdSource]:
    with (
        qemu.export(disk, bitmap=bitmap) as socket,
        closing(NbdSource(socket, "", dirty_bitmap=bitmap)) as source,
    ):
        yield source


def sampled(qemu, disk: Path) -> str:
    with served(qemu, disk) as source:
        return sample.take(source)


@pytest.fixture
def disk(qemu) -> Path:
    """Data at 40 MiB and at its odd end, of 64 MiB and 512 bytes."""
    path = qemu.folder / "disk"
    qemu.img("create", "-q", "-f", "qcow2", path, str(64 * MIB + 512))
    qemu.io(path, "write -P 1 40M 1M", "write -P 2 64M 512")
    qemu.img("bitmap", "--add", "-f", "qcow2", path, "since")
    return path


def test_it_is_of_places_with_data_and_of_the_last_cluster(qemu, disk) -> None:
    offsets = [int(entry.partition(":")[0]) for entry in sampled(qemu, disk).split(",")]
    assert 30 <= len(offsets) <= 34
    assert {0, 40 * MIB, 64 * MIB} <= set(offsets)


def test_what_is_cut_off_and_grown_again_was_in_it(qemu) -> None:
    disk = qemu.folder / "disk"
    qemu.img("create", "-q", "-f", "qcow2", disk, "1G")
    qemu.io(disk, "write -P 1 900M 1M", "write -P 2 1005M 64k")
    qemu.img("bitmap", "--add", "-f", "qcow2", disk, "since")
    before = sampled(qemu, disk)
    qemu.img("resize", "-q", "-f", "qcow2", "--shrink", disk, "1001M")
    qemu.img("resize", "-q", "-f", "qcow2", disk, "1G")
    with served(qemu, disk, bitmap="since") as source:
        assert sample.contradiction(source, before) == 1005 * MIB


def test_writes_that_the_bitmap_has_seen_contradict_nothing(qemu, disk) -> None:
    before = sampled(qemu, disk)
    qemu.io(disk, "write -P 9 40M 64k", "discard 64M 512")
    with served(qemu, disk, bitmap="since") as source:
        assert sample.contradiction(source, before) is None


@pytest.mark.parametrize(
    ("change", "offset"), [("write -P 9 40M 512", 40 * MIB), ("write -z 64M 512", 64 * MIB)]
)
def test_a_write_that_it_has_not_seen(qemu, disk, change: str, offset: int) -> None:
    before = sampled(qemu, disk)
    qemu.img("bitmap", "--disable", "-f", "qcow2", disk, "since")
    qemu.io(disk, change)
    with served(qemu, disk, bitmap="since") as source:
        assert sample.contradiction(source, before) == offset


def test_a_disk_that_has_grown_or_shrunk(qemu, disk) -> None:
    before = sampled(qemu, disk)
    qemu.img("resize", "-q", "-f", "qcow2", disk, "80M")
    with served(qemu, disk, bitmap="since") as source:
        assert sample.contradiction(source, before) is None
    qemu.img("resize", "-q", "-f", "qcow2", "--shrink", disk, "1M")
    with served(qemu, disk, bitmap="since") as source:
        assert sample.contradiction(source, before) is None  # the size itself tells


def test_small_disks(qemu) -> None:
    for size, clusters in ((0, 0), (512, 1), (65536 + 512, 2)):
        path = qemu.folder / f"small-{size}"
        qemu.img("create", "-q", "-f", "qcow2", path, str(size))
        assert len(sampled(qemu, path).split(",")) == max(clusters, 1)
        assert bool(sampled(qemu, path)) == bool(clusters)


@pytest.mark.parametrize(
    "text", ["1", "1:2", "0:1f2e3d4c5b6a7988,", "-1:1f2e3d4c5b6a7988", "0:1F2E3D4C5B6A7988"]
)
def test_what_is_no_sample(qemu, disk, text: str) -> None:
    with served(qemu, disk, bitmap="since") as source, pytest.raises(InvalidInput, match="is not a list"):
        sample.contradiction(source, text)
