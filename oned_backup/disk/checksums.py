"""Checksums of a file that passes by, computed in a thread beside the reading."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

from blake3 import blake3

from oned_backup.disk.blocks import BlockDigests
from oned_backup.disk.buffers import Batch

#: pieces that may wait for the hashing thread
_WAITING = 4


class Checksums:
    """BLAKE3 of the whole file and XXH3-128 of each 64 KiB of it.

    Feed it in file order, then call `finish`. Both libraries release the GIL.
    A file whose head is known last is fed from `begin` on, and the head after
    that; then BLAKE3 is of the bytes in that order.
    """

    def __init__(self, begin: int = 0) -> None:
        self._linear = blake3()
        self._blocks = BlockDigests(begin)
        self._queue: queue.Queue[tuple[memoryview, Batch | None] | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="checksums", daemon=True)
        self._thread.start()

    def feed(self, view: memoryview, batch: Batch | None = None) -> None:
        """The next bytes. They must not change until hashed: a batch is held for that long."""
        if batch is not None:
            batch.hold()
        self._queue.put((view, batch))

    def finish(self) -> None:
        """Wait until all is hashed."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._blocks.finish()

    @property
    def blake3(self) -> str:
        """Hex digest of the whole file."""
        return str(self._linear.hexdigest())

    def blocks_bytes(self) -> Iterator[bytes]:
        """The content of the `.blocks` file."""
        return self._blocks.file_bytes()

    def close(self) -> None:
        """Stop, whether or not the file has ended."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._blocks.close()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            view, batch = item
            try:
                if self._error is None:
                    self._linear.update(view)
                    self._blocks.update(view)
            except BaseException as error:  # noqa: BLE001  # top of a thread: raised by finish
                self._error = error
            finally:
                if batch is not None:
                    batch.release()
