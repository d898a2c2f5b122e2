"""What a virtual image reads its data from."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from oned_backup.disk.buffers import Batch
from oned_backup.disk.spans import Spans


class Source(Protocol):
    """A frozen disk: an NBD export (`nbdsource`) or a chain of stored files (`chain`)."""

    @property
    def guest_bytes(self) -> int:
        """Virtual size."""

    def stream(self, data: Spans) -> Generator[Batch, None, None]:
        """These clusters in guest order; bytes beyond the end of the disk are zero.

        A batch is valid until the next one is asked for, or until the last of
        those who hold it lets go.
        """

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the guest's bytes at `offset`; not while a stream is running."""

    def close(self) -> None:
        """Let go of files and connections."""
