"""Merged layers take the place of what they were merged from: a real QEMU sees no difference."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oned_backup.disk.chain import Layer
from oned_backup.disk.merge import open_merged
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.errors import DataCorrupt, InvalidInput
from tests.unit.disk.conftest import Qemu, store

SMALL = 4096
WIDTH = 12  # clusters of the disks here

#: where (in units of 4 KiB), how many of them, and what is written there
write = st.tuples(
    st.integers(0, WIDTH * 16), st.integers(1, 40), st.sampled_from(["data", "data", "zero", "part"])
)


@st.composite
def layer_patterns(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, str]]]:
    """Size in bytes, cluster size, and what the layer holds."""
    size = draw(st.sampled_from([CLUSTER * WIDTH, CLUSTER * 7, CLUSTER * 9 + 1536, CLUSTER * 5 - 512]))
    return size, draw(st.sampled_from([CLUSTER, CLUSTER, SMALL])), draw(st.lists(write, max_size=4))


def made(
    qemu: Qemu, name: str, size: int, cluster: int, writes: Sequence[tuple[int, int, str]], pattern: int
) -> Layer:
    """A layer that holds exactly this; QEMU pads a cluster that is filled in part with zeros."""
    path = qemu.folder / name
    qemu.img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, str(size))
    commands = []
    for at, count, kind in writes:
        offset = min(at * SMALL, size - 512) // (512 if kind == "part" else cluster)
        offset *= 512 if kind == "part" else cluster
        length = max(512, min(count * SMALL, size - offset) // 512 * 512)
        if kind == "zero":
            whole = min(-(-length // cluster) * cluster, size - offset)
            commands.append(f"write -z {offset} {whole}")
        else:
            commands.append(f"write -P {pattern} {offset} {length}")
    if commands:
        qemu.io(path, *commands)
    return Layer(path, None, name)


def judged(qemu: Qemu, layers: Sequence[Layer], name: str) -> Path:
    """What QEMU itself makes of the chain, as one raw file."""
    below: Path | None = None
    for number, layer in enumerate(layers):
        view = qemu.folder / f"view-{name}-{number}"
        shutil.copy(layer.path, view)
        if below is not None:
            qemu.img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, view)
        below = view
    raw = qemu.folder / f"{name}.raw"
    qemu.img("convert", "-f", "qcow2", "-O", "raw", below or "", raw)
    return raw


def merged(
    qemu: Qemu, layers: Sequence[Layer], name: str, *, full: bool, beneath: Sequence[Layer] = ()
) -> Layer:
    with open_merged(layers, full=full, beneath=beneath) as image:
        layer = store(image, qemu.folder / name)
        assert image.pread(0, image.size_bytes) == layer.path.read_bytes()
    qemu.img("check", "-q", "-f", "qcow2", layer.path)
    return layer


@settings(max_examples=25)
@given(
    patterns=st.lists(layer_patterns(), min_size=3, max_size=5),
    first=st.integers(0, 2),
    count=st.integers(1, 4),
)
def test_a_merge_changes_what_nobody_reads(
    qemu, patterns: list[tuple[int, int, list[tuple[int, int, str]]]], first: int, count: int
) -> None:
    """Whatever sizes the layers have: before, at and after the merged ones the chain reads as it did."""
    for stale in qemu.folder.iterdir():
        stale.unlink()
    layers = [made(qemu, f"l{n}", *pattern, n + 1) for n, pattern in enumerate(patterns)]
    before, middle, after = layers[:first], layers[first : first + count], layers[first + count :]
    result = merged(qemu, middle, "merged", full=not before, beneath=before)
    at = judged(qemu, [*before, *middle], "then")
    assert judged(qemu, [*before, result], "now").read_bytes() == at.read_bytes()
    later = judged(qemu, layers, "later")
    assert judged(qemu, [*before, result, *after], "switched").read_bytes() == later.read_bytes()


def test_an_increment_keeps_its_zero_clusters_and_nothing_else(qemu) -> None:
    one = made(qemu, "one", 8 * CLUSTER, CLUSTER, [(0, 32, "data"), (48, 16, "zero")], 1)
    two = made(qemu, "two", 8 * CLUSTER, CLUSTER, [(16, 16, "zero"), (48, 16, "data")], 2)
    with open_merged([one, two], full=False) as image:
        assert image.layout.data == Spans.of((0, 1), (3, 4))
        assert image.layout.zero == Spans.of((1, 2))
    with open_merged([one, two], full=True) as image:
        assert image.layout.data == Spans.of((0, 1), (3, 4))
        assert image.layout.zero == Spans()


def test_what_a_smaller_layer_cut_off_stays_hidden(qemu) -> None:
    parent = made(qemu, "parent", 8 * CLUSTER, CLUSTER, [(0, 128, "data")], 1)
    narrow = made(qemu, "narrow", 3 * CLUSTER, CLUSTER, [], 2)
    wide = made(qemu, "wide", 6 * CLUSTER, CLUSTER, [], 3)
    result = merged(qemu, [narrow, wide], "merged", full=False)
    with open_merged([narrow, wide], full=False) as image:
        assert image.layout.zero == Spans.of((3, 6))
    data = judged(qemu, [parent, result], "now").read_bytes()
    assert data == (b"\1" * 3 * CLUSTER).ljust(6 * CLUSTER, b"\0")


def test_a_cluster_that_is_known_in_part_needs_what_lies_beneath(qemu) -> None:
    parent = made(qemu, "parent", 2 * CLUSTER, CLUSTER, [(0, 32, "data")], 1)
    short = made(qemu, "short", CLUSTER + 512, CLUSTER, [], 2)
    grown = made(qemu, "grown", 2 * CLUSTER, CLUSTER, [], 3)
    with pytest.raises(InvalidInput, match="first at guest byte 65536, cannot be merged without the layers"):
        open_merged([short, grown], full=False)
    result = merged(qemu, [short, grown], "merged", full=False, beneath=[parent])
    data = judged(qemu, [parent, result], "now").read_bytes()
    assert data == (b"\1" * (CLUSTER + 512)).ljust(2 * CLUSTER, b"\0")


def test_damage_is_found_before_it_is_copied(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "8M")
    qemu.io(disk, "write -P 1 0 8M")
    layers = [qemu.back_up(disk, "f0")]
    qemu.img("bitmap", "--add", disk, "b")
    qemu.io(disk, "write -P 2 1M 1M")
    layers.append(qemu.back_up(disk, "f1", bitmap="b"))
    data = bytearray(layers[0].path.read_bytes())
    place = len(data) - CLUSTER - random.randrange(CLUSTER)
    data[place] ^= 1
    layers[0].path.write_bytes(data)
    with open_merged(layers, full=True) as image:
        with pytest.raises(DataCorrupt, match=r"f0: guest bytes 8257536 to 8323072"):
            for _ in image.chunks():
                pass
        with pytest.raises(RuntimeError):
            _ = image.blake3
