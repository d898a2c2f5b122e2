"""A backup file that is made in one pass, and the checksums that the pass leaves."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Self

from oned_backup.disk.blocks import blocks_size_bytes
from oned_backup.disk.checksums import Checksums
from oned_backup.disk.layout import Layout
from oned_backup.disk.source import Source

#: metadata clusters that are handed out as one chunk
_METADATA_GROUP = 16


class OnePass:
    """Base of all images. Close it, or use it as a context manager."""

    #: `chunks` gives what is to be stored from this offset on; see `head`
    head_bytes = 0
    #: of a compressed file: the size that it would have
    uncompressed_bytes = 0

    def __init__(self, source: Source, layout: Layout, *, checksums: bool) -> None:
        self._source = source
        self.layout = layout
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
        """Size of the file; of one that is compressed the most it can be, until the pass has ended."""
        return self.layout.size_bytes

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
        self._checksums = Checksums(self.head_bytes) if self._with_checksums else None
        self._pass = self._run(self._checksums)
        return self._pass

    def head(self) -> Iterator[memoryview]:
        """The first `head_bytes` bytes of the file, after a complete pass."""
        if not self.head_bytes:
            return
        if not self._complete:
            raise RuntimeError("the head is known only after a complete pass over chunks()")
        yield from self._metadata()

    @property
    def blake3(self) -> str:
        """Hex digest after a complete pass: of the file from `head_bytes` to its end, then from 0 on."""
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
        """One pass: yield the bytes, feed the checksums, finish them, set `_complete`."""
        raise NotImplementedError

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
