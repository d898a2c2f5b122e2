"""Where a stored file is no longer what was written, of all of it or of a sample. Knows nothing of qcow2."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from oned_backup.disk.blocks import BlockFile
from oned_backup.disk.buffers import BATCH_BYTES
from oned_backup.disk.spans import CLUSTER
from oned_backup.disk.stored import OpenedFile, open_stored
from oned_backup.errors import DataCorrupt

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class BadRange:
    """A range of a file that is not what was written."""

    file: str
    offset: int
    length: int
    text: str


def verify_blocks(
    path: Path, blocks_path: Path, percent: float = 100, *, progress: Progress | None = None
) -> list[BadRange]:
    """The ranges of the file that do not match its `.blocks`, of all or of a random `percent`.

    A wrong size or an unreadable `.blocks` file is a failure too.
    """
    _forget_cached(path)
    try:
        stored = OpenedFile(path, blocks_path)
    except DataCorrupt as error:
        return [BadRange(str(blocks_path), 0, 0, str(error))]
    try:
        failures = _wrong_size(path, blocks_path, stored.size_bytes)
        groups = _sample(-(-stored.size_bytes // BATCH_BYTES), percent)
        view = memoryview(bytearray(BATCH_BYTES))
        bad: list[tuple[int, int]] = []
        for number, group in enumerate(groups, 1):
            offset = group * BATCH_BYTES
            bad += stored.read_into(offset, view[: min(BATCH_BYTES, stored.size_bytes - offset)])
            if progress is not None:
                progress(number * BATCH_BYTES, len(groups) * BATCH_BYTES)
    finally:
        stored.close()
    return failures + [
        BadRange(str(path), offset, length, f"{path}: {length} bytes at {offset} do not match their checksum")
        for offset, length in bad
    ]


def _wrong_size(path: Path, blocks_path: Path, size: int) -> list[BadRange]:
    blocks = BlockFile(blocks_path)
    try:
        expected = blocks.data_offset + blocks.count * CLUSTER
    finally:
        blocks.close()
    if expected - CLUSTER < size <= expected:
        return []
    start, end = sorted((size, expected))
    text = f"{path}: {size} bytes, but its checksums are those of {expected}"
    return [BadRange(str(path), start, end - start, text)]


def _sample(count: int, percent: float) -> list[int]:
    """Which of `count` groups to read: at least one, in ascending order."""
    wanted = min(count, max(1, math.ceil(count * percent / 100)))
    return sorted(random.sample(range(count), wanted))


def _forget_cached(path: Path) -> None:
    """Make the reads that follow come from the disk, as far as the kernel agrees."""
    fd = open_stored(path)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
