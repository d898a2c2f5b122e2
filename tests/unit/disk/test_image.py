"""The computed qcow2 file, judged by QEMU, without any server."""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from oned_backup.disk.buffers import Batch, Pool, batches
from oned_backup.disk.chain import Layer
from oned_backup.disk.image import VirtualImage
from oned_backup.disk.layout import MAX_GUEST_BYTES, Layout
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.errors import Unsupported

TIB = 1 << 40


def content(cluster: int, guest_bytes: int) -> bytes:
    """A cluster of a disk on which each cluster repeats its own number."""
    length = max(0, min(CLUSTER, guest_bytes - cluster * CLUSTER))
    return (struct.pack("<Q", cluster + 1) * (CLUSTER // 8))[:length].ljust(CLUSTER, b"\0")


class NumberedDisk:
    def __init__(self, guest_bytes: int) -> None:
        self.guest_bytes = guest_bytes

    def stream(self, data: Spans) -> Generator[Batch, None, None]:
        pool = Pool(2)
        for parts in batches(data):
            batch = pool.take(wait=True)
            assert batch is not None
            batch.load(parts)
            for part in parts:
                self.read_into(part.offset, batch.view[part.position : part.position + part.length])
            yield batch
            batch.release()

    def read_into(self, offset: int, view: memoryview) -> None:
        whole = b"".join(
            content(cluster, self.guest_bytes)
            for cluster in range(offset // CLUSTER, -(-(offset + len(view)) // CLUSTER))
        )
        view[:] = whole[offset % CLUSTER : offset % CLUSTER + len(view)]

    def close(self) -> None: ...


def image(guest_bytes: int, data: Spans, zero: Spans | None = None) -> VirtualImage:
    return VirtualImage(NumberedDisk(guest_bytes), data, zero or Spans())


@pytest.mark.parametrize(
    "guest_bytes", [0, 1, 511, 512, 513, CLUSTER - 1, CLUSTER, CLUSTER + 1, 3 * CLUSTER + 7]
)
def test_sizes_that_are_no_multiple_of_anything(
    qemu, stored: Callable[[VirtualImage, Path], Layer], guest_bytes: int
) -> None:
    everything = Spans()
    everything.add_bytes(0, guest_bytes)
    with image(guest_bytes, everything) as view:
        layer = stored(view, qemu.folder / "f")
    assert qemu.img("check", layer.path).startswith("No errors were found")
    raw = qemu.folder / "raw"
    qemu.img("convert", "-f", "qcow2", "-O", "raw", layer.path, raw)
    expected = b"".join(content(cluster, guest_bytes) for cluster in range(everything.total))[:guest_bytes]
    assert raw.read_bytes().rstrip(b"\0") == expected.rstrip(b"\0")
    assert raw.stat().st_size == -(-guest_bytes // 512) * 512


def test_data_far_apart_on_a_huge_disk(qemu, stored: Callable[[VirtualImage, Path], Layer]) -> None:
    clusters = 8 * TIB // CLUSTER
    data = Spans.of((0, 1), (8191, 8194), (clusters // 2, clusters // 2 + 40), (clusters - 1, clusters))
    zero = Spans.of((8190, 8191), (20000, 50000))
    with image(8 * TIB, data, zero) as view:
        layer = stored(view, qemu.folder / "f")
    assert qemu.img("check", layer.path).startswith("No errors were found")
    for cluster in (0, 8191, 8193, clusters // 2 + 39, clusters - 1):
        found = qemu.io(layer.path, f"read -v {cluster * CLUSTER} 16")
        assert struct.pack("<Q", cluster + 1).hex(" ") in found
    mapped = qemu.img("map", "--output=json", layer.path)
    assert (
        f'"start": {8190 * CLUSTER}, "length": {CLUSTER}, "depth": 0, "present": true, "zero": true' in mapped
    )


def test_more_data_than_one_refcount_block_counts(
    qemu, stored: Callable[[VirtualImage, Path], Layer]
) -> None:
    # 32,768 clusters a block: 2 GiB. The file is made of holes, only the tables are written.
    layout = Layout(3 << 30, Spans.of((0, 49152)), Spans())
    path = qemu.folder / "f"
    with path.open("wb") as file:
        for index in range(layout.metadata_clusters):
            file.write(layout.metadata_cluster(index))
        file.truncate(layout.size_bytes)
    assert qemu.img("check", path).startswith("No errors were found")


runs = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.booleans()), max_size=12)


@settings(max_examples=25)
@given(runs, st.integers(0, CLUSTER), st.data())
def test_any_layout_reads_the_same_in_order_and_at_random(
    runs: list[tuple[int, int, bool]], tail: int, draw: st.DataObject
) -> None:
    data, zero, position = Spans(), Spans(), 0
    for gap, count, is_data in runs:
        (data if is_data else zero).add(position + gap, position + gap + count)
        position += gap + count
    with image(max(0, position * CLUSTER - tail), data, zero) as view:
        whole = b"".join(bytes(chunk) for chunk in view.chunks())
        assert len(whole) == view.size_bytes
        assert view.blake3 == blake3(whole).hexdigest()
        for _ in range(5):
            offset = draw.draw(st.integers(0, len(whole) + 10))
            length = draw.draw(st.integers(0, 5 * CLUSTER))
            assert view.pread(offset, length) == whole[offset : offset + length]


def test_a_second_pass_gives_the_same_file() -> None:
    with image(9 * CLUSTER, Spans.of((1, 4))) as view:
        first = b"".join(bytes(chunk) for chunk in view.chunks())
        checksum = view.blake3
        half = view.chunks()
        next(half)
        with pytest.raises(RuntimeError, match="complete pass"):
            _ = view.blake3
        assert b"".join(bytes(chunk) for chunk in view.chunks()) == first
        assert view.blake3 == checksum
        assert list(half) == []


def test_a_disk_that_no_qcow2_file_can_hold_is_refused() -> None:
    with pytest.raises(Unsupported, match="at most"):
        Layout(MAX_GUEST_BYTES + 1, Spans(), Spans())
