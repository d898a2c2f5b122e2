"""A backup file whose bytes are computed while they are read.

`open_export` gives a frozen NBD export as the qcow2 file that the store will
hold: its size and layout are known before any data is read, it can be streamed
in one pass or read at any offset, and after the pass its checksums are there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from types import TracebackType
from typing import Self

from oned_backup.disk.blocks import blocks_size_bytes
from oned_backup.disk.checksums import Checksums
from oned_backup.disk.layout import Layout
from oned_backup.disk.nbdsource import NbdSource
from oned_backup.disk.source import Source
from oned_backup.disk.spans import CLUSTER, Spans

#: metadata clusters that are handed out as one chunk
_METADATA_GROUP = 16


def open_export(socket: str, export: str, *, dirty_bitmap: str = "") -> VirtualImage:
    """The backup file of a frozen export on a unix socket.

    With the name of the bitmap that the export offers: an increment, which
    holds what is dirty. Without: a full. `Unavailable` if the server cannot be
    reached or stops answering, `NotFound` if it does not offer the bitmap.
    """
    source = NbdSource(socket, export, dirty_bitmap=dirty_bitmap)
    try:
        data, zero = source.extents()
        return VirtualImage(source, data, zero)
    except BaseException:
        source.close()
        raise


class VirtualImage:
    """A qcow2 file over a source. Close it, or use it as a context manager."""

    def __init__(self, source: Source, data: Spans, zero: Spans, *, checksums: bool = True) -> None:
        self._source = source
        self.layout = Layout(source.guest_bytes, data, zero)
        self._with_checksums = checksums
        self._checksums: Checksums | None = None
        self._pass: Generator[memoryview, None, None] | None = None
        self._complete = False

    @property
    def guest_bytes(self) -> int:
        """Virtual size of the disk."""
        return self.layout.guest_bytes

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.layout.size_bytes

    @property
    def data_bytes(self) -> int:
        """How much of the file is data."""
        return self.layout.data.total * CLUSTER

    @property
    def blocks_size_bytes(self) -> int:
        """Size of the `.blocks` file that goes with it."""
        return blocks_size_bytes(self.size_bytes)

    def chunks(self) -> Generator[memoryview, None, None]:
        """The file's bytes in order; each view is valid until the next one is asked for.

        Begins a new pass: `blake3` and `blocks_bytes` are there when it has
        come to its end.
        """
        self._end_pass()
        self._checksums = Checksums() if self._with_checksums else None
        self._pass = self._run(self._checksums)
        return self._pass

    def pread(self, offset: int, length: int) -> bytes:
        """Bytes at any offset, fewer at the end of the file; not during `chunks`."""
        length = max(0, min(length, self.size_bytes - offset))
        result = bytearray(length)
        view = memoryview(result)
        position = 0
        while position < length:
            index, skip = divmod(offset + position, CLUSTER)
            if index < self.layout.metadata_clusters:
                piece = self.layout.metadata_cluster(index)[skip : skip + length - position]
                view[position : position + len(piece)] = piece
                position += len(piece)
            else:
                first, end = self.layout.guest_run(index)
                start = first * CLUSTER + skip
                count = min(length - position, end * CLUSTER - start)
                self._source.read_into(start, view[position : position + count])
                position += count
        return bytes(result)

    @property
    def blake3(self) -> str:
        """Hex digest of the whole file, after a complete pass."""
        return self._finished().blake3

    def blocks_bytes(self) -> Iterator[bytes]:
        """Content of the `.blocks` file in pieces, after a complete pass."""
        return self._finished().blocks_bytes()

    def close(self) -> None:
        """End any pass and let the source go."""
        self._end_pass()
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, checksums: Checksums | None) -> Generator[memoryview, None, None]:
        for view in self._metadata():
            if checksums:
                checksums.feed(view)
            yield view
        with closing(self._source.stream(self.layout.data)) as stream:
            for batch in stream:
                if checksums:
                    checksums.feed(batch.view, batch)
                yield batch.view
        if checksums:
            checksums.finish()
        self._complete = True

    def _metadata(self) -> Iterator[memoryview]:
        count = self.layout.metadata_clusters
        for start in range(0, count, _METADATA_GROUP):
            group = range(start, min(count, start + _METADATA_GROUP))
            yield memoryview(b"".join([self.layout.metadata_cluster(index) for index in group]))

    def _finished(self) -> Checksums:
        if self._checksums is None or not self._complete:
            raise RuntimeError("checksums are there only after a complete pass over chunks()")
        return self._checksums

    def _end_pass(self) -> None:
        self._complete = False
        if self._pass is not None:
            # whoever iterates may have left in the middle: its threads end here
            self._pass.close()
            self._pass = None
        if self._checksums is not None:
            self._checksums.close()
            self._checksums = None
