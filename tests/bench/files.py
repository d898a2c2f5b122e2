"""Rows about stored files, by the data engine alone: merging and compressing them; against qemu-img."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from oned_backup.disk.chain import Layer
from oned_backup.disk.image import open_export
from oned_backup.disk.merge import open_merged
from oned_backup.disk.onepass import OnePass
from oned_backup.sdk.publish import Folder
from tests.bench.machines import CLUSTER, Data
from tests.bench.peers import chain_node, timed
from tests.bench.table import Row, compared

#: as an argument list takes them
_WRITES_AT_ONCE = 400
_ZSTD_LEVEL = 3


def measure(directory: Path, template: Path, data: Data, increments: int, runs: int) -> list[Row]:
    """A chain merged into a full backup, and a full backup compressed, each in turns with qemu-img."""
    place = directory / "files"
    place.mkdir()
    layers = [_stored(open_merged([Layer(template, None, "template")], full=True), place, "full")]
    for number in range(increments):
        dirty = _increment(place / "dirty", data, number)
        layers.append(_stored(open_merged([dirty], full=False), place, f"increment.{number}"))
    merged, converted, packed, squeezed, ratios = [], [], [], [], []
    for _ in range(runs):
        merged.append(_seconds(lambda: _stored(open_merged(layers, full=True), place, "merged")))
        converted.append(_convert(chain_node([layer.path for layer in layers]), place, "-m", "16"))
        with _served(template, place / "nbd.sock") as socket:
            packed.append(_seconds(lambda: _stored(_export(socket), place, "packed")))
        zstd = ("-c", "-o", "compression_type=zstd", "-m", "8")
        squeezed.append(_convert(str(template), place, *zstd))
        ratios.append((place / "packed").stat().st_size / (place / "converted").stat().st_size)
    flatten = f"flatten of full + {increments} of 1 % / qemu-img convert"
    return [
        compared(flatten, merged, converted, bar=1.3, moved=data.allocated),
        compared("full, zstd / qemu-img convert -c", packed, squeezed, bar=1.1, moved=data.allocated),
        Row("its size / that of qemu-img", ratios[-1], ratio=round(ratios[-1], 3), bar=1.02, unit=""),
    ]


def _seconds(work: Callable[[], object]) -> float:
    started = time.monotonic()
    work()
    return time.monotonic() - started


def _export(socket: str) -> OnePass:
    return open_export(socket, "").compressed(_ZSTD_LEVEL)


def _stored(image: OnePass, place: Path, name: str) -> Layer:
    """The image and its checksums as the fs datastore keeps them: durable."""
    with image, Folder.open(place) as folder:
        for each in (name, f"{name}.blocks"):
            folder.remove(each)
        folder.write_file(name, image.chunks(), begin=image.head_bytes, head=image.head)
        folder.write_file(f"{name}.blocks", image.blocks_bytes())
    return Layer(place / name, place / f"{name}.blocks", name)


def _convert(source: str, place: Path, *options: str) -> float:
    target = place / "converted"
    target.unlink(missing_ok=True)
    return timed(["qemu-img", "convert", "-W", *options, "-O", "qcow2", source, str(target)], durable=target)


def _increment(path: Path, data: Data, seed: int) -> Layer:
    """A qcow2 that holds one per cent of the clusters with data, at random."""
    clusters = data.clusters()
    chosen = sorted(random.Random(seed).sample(clusters, max(1, len(clusters) // 100)))
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(data.virtual)], check=True, timeout=60
    )
    for start in range(0, len(chosen), _WRITES_AT_ONCE):
        words: list[str] = []
        for offset in chosen[start : start + _WRITES_AT_ONCE]:
            words += ["-c", f"write -q -P {1 + offset // CLUSTER % 255} {offset} {CLUSTER}"]
        subprocess.run(["qemu-io", "-f", "qcow2", *words, str(path)], check=True, timeout=600)
    return Layer(path, None, path.name)


@contextmanager
def _served(image: Path, socket: Path) -> Iterator[str]:
    """The socket of a qemu-nbd."""
    argv = ["qemu-nbd", "--read-only", "--fork", "--persistent", "-f", "qcow2"]
    pid_file = socket.with_suffix(".pid")
    subprocess.run(
        [*argv, "--socket", str(socket), "--pid-file", str(pid_file), str(image)], check=True, timeout=60
    )
    try:
        yield str(socket)
    finally:
        subprocess.run(["kill", pid_file.read_text().strip()], check=True)
