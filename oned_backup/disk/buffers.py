"""Buffers that are made once and go round: source → hashing and writing → source.

Allocating memory for each request costs more than reading it does; so each
pass over a disk has one pool, and the pool's size is what bounds its memory.
"""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from oned_backup.disk.spans import CLUSTER, Spans

#: Small enough that a dozen fit into a backup's memory limit, large enough for full speed.
BATCH_BYTES = 2 << 20
POOL_BUFFERS = 14


@dataclass(frozen=True, slots=True)
class Part:
    """`length` bytes of the guest at `offset`, found at `position` of the batch's buffer."""

    offset: int
    length: int
    position: int


class Batch:
    """A buffer full of data clusters in guest order; whoever needs it longer holds it."""

    def __init__(self, pool: Pool, memory: memoryview) -> None:
        self._pool = pool
        self._holders = 0
        self.memory = memory
        self.parts: list[Part] = []
        self.view = memory[:0]

    def load(self, parts: list[Part]) -> None:
        """Begin a new turn with these parts, held once."""
        self.parts = parts
        self.view = self.memory[: parts[-1].position + parts[-1].length]
        self._holders = 1

    def hold(self) -> None:
        """Keep the content until one more `release`."""
        with self._pool.lock:
            self._holders += 1

    def release(self) -> None:
        """Let go; the last holder's call returns the buffer to its pool."""
        with self._pool.lock:
            self._holders -= 1
            if self._holders:
                return
        self._pool.give_back(self)


class Pool:
    """A fixed number of page-aligned buffers."""

    def __init__(self, count: int = POOL_BUFFERS) -> None:
        self.lock = threading.Lock()
        self._closed = False
        self._free: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(Batch(self, memoryview(mmap.mmap(-1, BATCH_BYTES))))

    def take(self, *, wait: bool) -> Batch | None:
        """A free buffer; None if there is none now (not `wait`) or the pool was closed."""
        try:
            batch = self._free.get(block=wait)
        except queue.Empty:
            return None
        if batch is None:
            self._free.put(None)  # the next one who waits must wake up too
        return batch

    def give_back(self, batch: Batch) -> None:
        """Nobody holds the batch any more."""
        if not self._closed:
            self._free.put(batch)

    def close(self) -> None:
        """No more buffers: whoever waits for one gets None. What is still held stays valid.

        The free buffers are let go here: they and the pool refer to each other,
        and their memory is too much to leave to the garbage collector.
        """
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._free.get_nowait()
        self._free.put(None)


def batches(data: Spans, limit: int = BATCH_BYTES) -> Iterator[list[Part]]:
    """The clusters of `data` in order, cut so that each list fits a buffer of `limit` bytes."""
    parts: list[Part] = []
    position = 0
    for first, end in data:
        offset, stop = first * CLUSTER, end * CLUSTER
        while offset < stop:
            length = min(stop - offset, limit - position)
            parts.append(Part(offset, length, position))
            offset += length
            position += length
            if position == limit:
                yield parts
                parts, position = [], 0
    if parts:
        yield parts
