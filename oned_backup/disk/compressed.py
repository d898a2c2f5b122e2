"""A backup file with compressed clusters (zstd), which QEMU 5.1 and later read.

    header │ refcount table │ refcount blocks │ L1 │ L2 tables │ data, nearly in guest order
    └──────────────── head: known last ──────────────────────┘ └── chunks(): written first ──┘

How much room the head takes is known beforehand, so the data can be written
behind it in one pass, and the head when it is known. The whole file is at most
as large as it were without compression.

Compressed clusters lie side by side without gaps. One that hardly shrinks is
stored as it is, which must begin at a multiple of 64 KiB; so within each buffer
those clusters come together, first or last, whichever leaves the smaller gap.
What turns out to be zeros becomes a zero cluster.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
from array import array
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing

import zstandard

from oned_backup.disk.buffers import Batch
from oned_backup.disk.checksums import Checksums
from oned_backup.disk.codec import ZSTD
from oned_backup.disk.layout import (
    COMPRESSED,
    COMPRESSION_BIT,
    COPIED,
    L2_ENTRIES,
    REFCOUNTS,
    SECTOR,
    ZERO_FLAG,
    Layout,
    big_endian,
)
from oned_backup.disk.onepass import OnePass
from oned_backup.disk.source import Source
from oned_backup.disk.spans import CLUSTER

#: an L2 entry has the offset in this many bits, above it the number of further sectors
OFFSET_BITS = 62 - (CLUSTER.bit_length() - 1 - 8)
#: reading a compressed cluster costs more than reading a plain one; less gain than this is not worth it
_GAIN = 4096
#: whatever compresses to less than this may be zeros
_TINY = 64
_ZEROS = bytes(CLUSTER)
_MAX_THREADS = 4
#: tables beyond this go to an unlinked temporary file
_IN_MEMORY = 1 << 20

#: a cluster as it will be stored: compressed, as it is, or (None) not at all
Packed = bytes | memoryview | None


class CompressedImage(OnePass):
    """A qcow2 file over a source, with what was laid out for an uncompressed one; see `VirtualImage`."""

    def __init__(self, source: Source, plain: Layout, level: int, *, checksums: bool) -> None:
        self._placed = _Placed(plain)
        super().__init__(source, self._placed, checksums=checksums)
        self.head_bytes = plain.data_offset
        self.uncompressed_bytes = plain.size_bytes
        self._level = level

    def close(self) -> None:
        """End any pass and let the source go."""
        super().close()
        self._placed.close()

    def _run(self, checksums: Checksums | None) -> Generator[memoryview, None, None]:
        placed = self._placed
        placed.begin()
        rest = b""
        with closing(self._packed()) as stream:
            for packed in stream:
                data = b"".join((rest, *placed.add(packed)))
                rest = data[len(data) // CLUSTER * CLUSTER :]
                view = memoryview(data)[: len(data) - len(rest)]
                if checksums:
                    checksums.feed(view)
                yield view
        view = memoryview(rest.ljust(CLUSTER if rest else 0, b"\0"))
        placed.end()
        if checksums:
            checksums.feed(view)
        yield view
        if checksums:
            for piece in self._metadata():
                checksums.feed(piece)
            checksums.finish()
        self._complete = True

    def _packed(self) -> Generator[list[Packed], None, None]:
        """The clusters of each batch, compressed in several threads, in order."""
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        compressor = _Compressor(self._level)
        waiting: deque[tuple[Batch, Future[list[Packed]]]] = deque()
        with (
            closing(self._source.stream(self.layout.data)) as stream,
            ThreadPoolExecutor(threads, "zstd") as pool,
        ):
            for batch in stream:
                batch.hold()
                waiting.append((batch, pool.submit(compressor.pack, batch.view)))
                if len(waiting) > threads:
                    yield from _next(waiting)
            while waiting:
                yield from _next(waiting)


def _next(waiting: deque[tuple[Batch, Future[list[Packed]]]]) -> Iterator[list[Packed]]:
    batch, packed = waiting.popleft()
    yield packed.result()
    batch.release()


class _Compressor:
    """Compresses whole buffers; may be used by any number of threads, each of which has its own state."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._own = threading.local()

    def pack(self, view: memoryview) -> list[Packed]:
        """The clusters in `view`; zstandard releases the GIL."""
        if not hasattr(self._own, "compress"):
            self._own.compress = zstandard.ZstdCompressor(level=self._level).compress
        compress = self._own.compress
        result: list[Packed] = []
        for start in range(0, len(view), CLUSTER):
            cluster = view[start : start + CLUSTER]
            packed = compress(cluster)
            if len(packed) > CLUSTER - _GAIN:
                result.append(cluster)
            elif len(packed) < _TINY and bytes(cluster) == _ZEROS:
                result.append(None)
            else:
                result.append(packed)
        return result


class _Placed(Layout):
    """The layout whose tables are known when all clusters have been placed."""

    def __init__(self, plain: Layout) -> None:
        super().__init__(plain.guest_bytes, plain.data, plain.zero)
        self._most = self.clusters
        self._entries, self._refcounts = _Table(), _Table()
        self.begin()

    def begin(self) -> None:
        """Nothing has been placed."""
        self.clusters = self._most
        self._entries.clear()
        self._refcounts.clear()
        self._position = self.data_offset
        self._references = array("H", [0])  # to the last cluster of the file

    def add(self, packed: Sequence[Packed]) -> list[bytes | memoryview]:
        """The next clusters of the guest's data: what to write for them."""
        small = [(index, data) for index, data in enumerate(packed) if isinstance(data, bytes)]
        plain = [(index, data) for index, data in enumerate(packed) if isinstance(data, memoryview)]
        entries = array("Q", [ZERO_FLAG]) * len(packed)
        pieces: list[bytes | memoryview] = []
        if self._position % CLUSTER == 0:
            self._add_plain(plain, entries, pieces)
            self._add_small(small, entries, pieces)
        else:
            self._add_small(small, entries, pieces)
            self._add_plain(plain, entries, pieces)
        self._entries.append(entries)
        self._refcounts.append(self._references[:-1])
        self._references = self._references[-1:]
        return pieces

    def end(self) -> None:
        """All data has been placed; the file ends with its last cluster."""
        self._refcounts.append(self._references)
        self.clusters = -(-self._position // CLUSTER)

    def close(self) -> None:
        """Free the temporary files."""
        self._entries.close()
        self._refcounts.close()

    def _add_plain(
        self, plain: Sequence[tuple[int, memoryview]], entries: array[int], pieces: list[bytes | memoryview]
    ) -> None:
        if not plain:
            return
        pieces.append(_ZEROS[: -self._position % CLUSTER])
        for index, data in plain:
            self._go_to(-(-self._position // CLUSTER) * CLUSTER)
            self._references[-1] = 1
            entries[index] = COPIED | self._position
            self._go_to(self._position + CLUSTER)
            pieces.append(data)

    def _add_small(
        self, small: Sequence[tuple[int, bytes]], entries: array[int], pieces: list[bytes | memoryview]
    ) -> None:
        for index, data in small:
            first, end = self._position, self._position + len(data)
            sectors = (end - 1) // SECTOR - first // SECTOR
            entries[index] = COMPRESSED | sectors << OFFSET_BITS | first
            self._references[-1] += 1
            self._go_to(end)
            if end % CLUSTER and end // CLUSTER > first // CLUSTER:
                self._references[-1] += 1
            pieces.append(data)

    def _go_to(self, position: int) -> None:
        """The place of the next byte; at most one cluster further."""
        if position // CLUSTER > self._position // CLUSTER:
            self._references.append(0)
        self._position = position

    def _header(self, incompatible: int = 0, more: bytes = b"") -> bytes:
        return super()._header(incompatible | COMPRESSION_BIT, struct.pack(">B7x", ZSTD) + more)

    def _refcount_block(self, index: int) -> bytes:
        # the whole head is in use, even where blocks in it count nothing
        first = index * REFCOUNTS - self.metadata_clusters
        counts = array("H", [1]) * min(REFCOUNTS, max(0, -first))
        if len(counts) < REFCOUNTS:
            counts += array("H", self._refcounts.read(2 * max(0, first), 2 * (REFCOUNTS - len(counts))))
        return big_endian(counts)

    def _l2_table(self, index: int) -> bytes:
        entries = array("Q", bytes(CLUSTER))
        base = index * L2_ENTRIES
        position = 8 * self.data.rank(base)
        for first, end in self.data.within(base, base + L2_ENTRIES):
            entries[first - base : end - base] = array("Q", self._entries.read(position, 8 * (end - first)))
            position += 8 * (end - first)
        for first, end in self.zero.within(base, base + L2_ENTRIES):
            entries[first - base : end - base] = array("Q", [ZERO_FLAG]) * (end - first)
        return big_endian(entries)


class _Table:
    """Numbers that are appended in order and read anywhere; large ones lie in a temporary file."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115  # closed below

    def clear(self) -> None:
        self._file.seek(0)
        self._file.truncate()

    def append(self, numbers: array[int]) -> None:
        self._file.seek(0, os.SEEK_END)
        self._file.write(numbers)

    def read(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(length)

    def close(self) -> None:
        self._file.close()
