"""Compressed images: QEMU finds nothing to complain of, all is read back exactly, nothing is trusted."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from oned_backup.disk.buffers import Batch, Part, batches
from oned_backup.disk.chain import Layer
from oned_backup.disk.codec import unpack_deflate, unpack_zstd
from oned_backup.disk.compressed import CompressedImage
from oned_backup.disk.image import VirtualImage, open_export
from oned_backup.disk.merge import open_merged
from oned_backup.disk.ordered import OrderedFill
from oned_backup.disk.restore import restore_chain
from oned_backup.disk.scrub import verify_blocks
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.errors import DataCorrupt, Unsupported
from tests.unit.disk.conftest import Qemu
from tests.unit.disk.test_damage import flip

MIB = 1 << 20


class Memory:
    """A source whose disk is a string of bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.guest_bytes = len(content)

    def stream(self, data: Spans) -> Generator[Batch, None, None]:
        def fill(parts: list[Part], batch: Batch) -> None:
            batch.load(parts)
            for part in parts:
                self.read_into(part.offset, batch.view[part.position : part.position + part.length])

        return OrderedFill(batches(data), fill, threads=2).run()

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.content[offset : offset + len(view)].ljust(len(view), b"\0")

    def close(self) -> None:
        pass


def cluster_of(kind: str, chance: random.Random) -> bytes:
    match kind:
        case "text":
            return b" ".join(chance.choices([b"lorem", b"ipsum", b"dolor"], k=CLUSTER // 5))[:CLUSTER]
        case "some":
            share = chance.randrange(CLUSTER)
            return chance.randbytes(share).ljust(CLUSTER, b"x")
        case "random":
            return chance.randbytes(CLUSTER)
    return bytes(CLUSTER)


def store(image: CompressedImage, path: Path) -> Layer:
    """Write the image and its checksums as a datastore does, and see that all is as announced."""
    most = image.size_bytes
    with path.open("wb") as file:
        file.seek(image.head_bytes)
        for chunk in image.chunks():
            file.write(chunk)
        end = file.tell()
        file.seek(0)
        for chunk in image.head():
            file.write(chunk)
        assert file.tell() == image.head_bytes
    assert end == path.stat().st_size == image.size_bytes <= most == image.uncompressed_bytes
    blocks = path.with_name(path.name + ".blocks")
    blocks.write_bytes(b"".join(image.blocks_bytes()))
    assert blocks.stat().st_size == image.blocks_size_bytes
    assert verify_blocks(path, blocks) == []
    data = path.read_bytes()
    turned = data[image.head_bytes :] + data[: image.head_bytes]
    assert blake3(turned).hexdigest() == image.blake3
    return Layer(path, blocks, path.name)


def judged(qemu: Qemu, layers: Sequence[Layer]) -> bytes:
    """What QEMU reads, of the newest layer over the others."""
    below: Path | None = None
    for layer in layers:
        qemu.img("check", "-q", "-f", "qcow2", layer.path)
        view = qemu.folder / f"view-{layer.name}"
        view.write_bytes(layer.path.read_bytes())
        if below is not None:
            qemu.img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", below, view)
        below = view
    qemu.img("convert", "-f", "qcow2", "-O", "raw", below or "", qemu.folder / "judged")
    return (qemu.folder / "judged").read_bytes()


def restored(qemu: Qemu, layers: Sequence[Layer]) -> bytes:
    path = qemu.folder / "restored"
    path.unlink(missing_ok=True)
    restore_chain(layers, path, format="raw")
    return path.read_bytes()


kinds = st.lists(
    st.sampled_from(["absent", "zeros", "text", "text", "some", "random"]), min_size=1, max_size=120
)


@settings(max_examples=20)
@given(full=kinds, newer=kinds, cut=st.sampled_from([0, 0, 512, CLUSTER - 512]), seed=st.integers(0, 9))
def test_a_chain_of_compressed_images(qemu, full: list[str], newer: list[str], cut: int, seed: int) -> None:
    chance = random.Random(seed)
    content = b"".join(cluster_of(kind, chance) for kind in full)[: len(full) * CLUSTER - cut]
    data = Spans()
    for number, kind in enumerate(full):
        data.add(number, number + (kind != "absent"))
    layers = [store(VirtualImage(Memory(content), data, Spans()).compressed(3), qemu.folder / "f0")]
    assert restored(qemu, layers) == judged(qemu, layers) == content

    newer = newer[: len(full)]
    data, zero, now = Spans(), Spans(), bytearray(content)
    for number, kind in enumerate(newer):
        if kind != "absent":
            (zero if kind == "zeros" and chance.random() < 0.5 else data).add(number, number + 1)
            end = min((number + 1) * CLUSTER, len(content))
            now[number * CLUSTER : end] = cluster_of(kind, chance)[: end - number * CLUSTER]
    layers.append(store(VirtualImage(Memory(bytes(now)), data, zero).compressed(1), qemu.folder / "f1"))
    assert restored(qemu, layers) == judged(qemu, layers) == now

    with open_merged(layers, full=True) as merged:
        again = store(merged.compressed(3), qemu.folder / "f2")
    assert restored(qemu, [again]) == judged(qemu, [again]) == now


def test_an_export_and_a_disk_that_needs_many_tables(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "5T")
    qemu.io(disk, *(f"write -P {n + 1} {n * 13}G {n + 1}M" for n in range(20)))
    with qemu.export(disk) as socket, open_export(socket, "") as view:
        layer = store(view.compressed(3), qemu.folder / "f0")
    qemu.img("check", "-q", "-f", "qcow2", layer.path)
    qemu.same(layer.path, "qcow2", disk, "qcow2")
    restore_chain([layer], qemu.folder / "restored", format="qcow2")
    qemu.same(qemu.folder / "restored", "qcow2", disk, "qcow2")


def test_the_second_pass_is_like_the_first_and_an_abandoned_one_does_no_harm() -> None:
    content = random.Random(1).randbytes(40 * CLUSTER) + bytes(8 * MIB)
    with VirtualImage(Memory(content), Spans.of((0, 168)), Spans()).compressed(3) as image:
        next(iter(image.chunks()))
        with pytest.raises(RuntimeError, match="only after a complete pass"):
            next(image.head())
        passes = [(b"".join(image.chunks()), b"".join(image.head()), image.blake3) for _ in range(2)]
    assert passes[0] == passes[1]
    assert len(passes[0][0]) == 40 * CLUSTER


def test_data_that_does_not_shrink_is_stored_as_it_is(qemu) -> None:
    content = random.Random(1).randbytes(64 * CLUSTER)
    layer = store(VirtualImage(Memory(content), Spans.of((0, 64)), Spans()).compressed(3), qemu.folder / "f0")
    assert "0 compressed" not in qemu.img("check", layer.path)
    assert "0.00% compressed" in qemu.img("check", layer.path)


@pytest.fixture
def packed(qemu) -> Layer:
    """Twenty clusters of text with a random one in between."""
    chance = random.Random(1)
    content = b"".join(cluster_of("random" if n == 10 else "text", chance) for n in range(21))
    with VirtualImage(Memory(content), Spans.of((0, 21)), Spans()).compressed(3) as image:
        return store(image, qemu.folder / "f0")


def test_damage_is_named_and_what_is_left_is_salvaged(qemu, packed: Layer) -> None:
    good = restored(qemu, [packed])
    head = 5 * CLUSTER  # header, refcount table and block, L1, L2
    flip(packed.path, head + CLUSTER + 7)  # the random cluster comes first in its buffer
    with pytest.raises(
        DataCorrupt, match=r"f0: guest bytes 0 to 65536 \(file offset 393216, compressed\) cannot"
    ):
        restored(qemu, [packed])
    lost = restore_chain([packed], qemu.folder / "saved", format="raw", salvage=True).salvaged
    # what shares 64 KiB of the file with the damage goes with it
    size = sum(length for _, length in lost)
    assert lost[0][0] == 0
    assert size < 20 * CLUSTER
    expected = bytearray(good)
    for offset, length in lost:
        expected[offset : offset + length] = bytes(length)
    assert (qemu.folder / "saved").read_bytes() == expected


def patched(packed: Layer, what: bytes) -> Layer:
    """The layer without checksums, and with this where its first compressed cluster was."""
    data = bytearray(packed.path.read_bytes())
    data[6 * CLUSTER : 6 * CLUSTER + len(what)] = what
    packed.path.write_bytes(data)
    return Layer(packed.path, None, packed.name)


def peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10


def bombs() -> dict[str, bytes]:
    zeros = bytes(1 << 30)
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    wide = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
    far = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    return {
        "announced": zstandard.ZstdCompressor().compress(zeros),
        "unannounced": stream.compress(zeros) + stream.flush(),
        "wide": far.compress(zeros) + far.flush(),
        "short": zstandard.ZstdCompressor().compress(b"x" * 100),
        "no frame": b"\xff" * 40,
    }


def test_a_malicious_cluster_costs_no_memory(qemu, packed: Layer) -> None:
    for bomb in bombs().values():
        layer = patched(packed, bomb)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = peak_bytes()
        with pytest.raises(
            DataCorrupt, match=r"f0: guest bytes 0 to 65536 .*compressed\) cannot be expanded"
        ):
            restored(qemu, [layer])
        assert peak_bytes() - before < 64 * MIB


@settings(max_examples=200)
@given(data=st.binary(max_size=200), frame=st.booleans())
def test_whatever_the_bytes_are_a_codec_gives_a_cluster_or_nothing(data: bytes, frame: bool) -> None:
    start = b"\x28\xb5\x2f\xfd" if frame else b""
    for unpack in (unpack_zstd, unpack_deflate):
        found = unpack(memoryview(start + data), 512)
        assert found is None or len(found) == 512


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, CLUSTER, 2 * MIB])
def test_what_qemu_compressed(qemu, kind: str, cluster_size: int) -> None:
    raw = qemu.folder / "raw"
    chance = random.Random(cluster_size)
    raw.write_bytes(
        b"".join(cluster_of(chance.choice(["text", "some", "zeros"]), chance) for _ in range(100))
    )
    image = qemu.folder / "image"
    options = f"compression_type={kind},cluster_size={cluster_size}"
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    qemu.io(image, "write -P 1 1M 3k")
    assert restored(qemu, [Layer(image, None, "image")]) == judged(qemu, [Layer(image, None, "image")])


def test_a_method_of_compression_that_nobody_knows(qemu, packed: Layer) -> None:
    flip(packed.path, 104)  # 1 becomes 5
    with pytest.raises(Unsupported, match="compressed by method 5"):
        restored(qemu, [Layer(packed.path, None, "f0")])


def test_a_compressed_cluster_that_lies_beyond_the_end(qemu, packed: Layer) -> None:
    layer = Layer(packed.path, None, "f0")
    flip(packed.path, 4 * CLUSTER + 3)  # of the first L2 entry, bit 34
    with pytest.raises(DataCorrupt, match="lie at 17180262400 in a file of"):
        restored(qemu, [layer])
