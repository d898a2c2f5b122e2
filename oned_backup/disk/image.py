"""A backup file whose bytes are computed while they are read.

`open_export` gives a frozen NBD export as the qcow2 file that the store will
hold: its size and layout are known before any data is read, it can be streamed
in one pass or read at any offset, and after the pass its checksums are there.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING

from oned_backup.disk.checksums import Checksums
from oned_backup.disk.layout import Layout
from oned_backup.disk.onepass import OnePass
from oned_backup.disk.source import Source
from oned_backup.disk.spans import CLUSTER, Spans

if TYPE_CHECKING:
    from oned_backup.disk.compressed import CompressedImage


def open_export(socket: str, export: str, *, dirty_bitmap: str = "") -> VirtualImage:
    """The backup file of a frozen export on a unix socket.

    With the name of the bitmap that the export offers: an increment, which
    holds what is dirty. Without: a full. `Unavailable` if the server cannot be
    reached or stops answering, `NotFound` if it does not offer the bitmap.
    """
    from oned_backup.disk.nbdsource import NbdSource  # noqa: PLC0415 - others need no libnbd

    source = NbdSource(socket, export, dirty_bitmap=dirty_bitmap)
    try:
        data, zero = source.extents()
        return VirtualImage(source, data, zero)
    except BaseException:
        source.close()
        raise


class VirtualImage(OnePass):
    """A qcow2 file over a source."""

    def __init__(self, source: Source, data: Spans, zero: Spans, *, checksums: bool = True) -> None:
        super().__init__(source, Layout(source.guest_bytes, data, zero), checksums=checksums)

    def compressed(self, level: int) -> CompressedImage:
        """The same disk in a smaller file, which can be streamed only; the source goes over to it."""
        from oned_backup.disk.compressed import CompressedImage  # noqa: PLC0415 - others need no zstd

        return CompressedImage(self._source, self.layout, level, checksums=self._with_checksums)

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
