"""An NBD export, read with many requests in flight over one connection.

A thread keeps the connection busy and hands buffers over in guest order, so
that reading overlaps with hashing and writing. One connection is enough: QEMU
serves all connections of an export from one thread, and `qemu-nbd` lets only
one client in unless told otherwise.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Generator

import nbd

from oned_backup.disk.buffers import BATCH_BYTES, Batch, Pool, batches
from oned_backup.disk.extents import ExtentPass
from oned_backup.disk.spans import Spans
from oned_backup.errors import NotFound, Unavailable

BATCHES_IN_FLIGHT = 8
#: how long `poll` may sleep before it looks whether the pass was given up
_POLL_MS = 500
#: how long a server may take to close a connection that we have ended
_GOODBYE_S = 5.0


class NbdSource:
    """A connected export. `dirty_bitmap`: the name of the bitmap that the export offers."""

    def __init__(self, socket: str, export: str, *, dirty_bitmap: str = "") -> None:
        self._socket = socket
        self._export = export
        self._where = f"NBD export {export!r} on {socket}"
        #: as NBD names it; empty: none
        self.dirty_context = f"qemu:dirty-bitmap:{dirty_bitmap}" if dirty_bitmap else ""
        self._streaming = False
        self._handle = self._connect()
        self._guest_bytes = int(self._handle.get_size())

    @property
    def guest_bytes(self) -> int:
        """Virtual size."""
        return self._guest_bytes

    def extents(self) -> tuple[Spans, Spans]:
        """The clusters to store as data, and those to store as zero clusters (increments only).

        In a full, whatever does not read as zero is data. In an increment only
        what is dirty counts; dirty clusters that read as zero must hide what
        the parent has there.
        """
        handle = self._handle
        contexts = [nbd.CONTEXT_BASE_ALLOCATION]
        if self.dirty_context:
            if not handle.can_meta_context(self.dirty_context):
                raise NotFound(f"{self._where}: no dirty bitmap {self.dirty_context!r}")
            contexts.append(self.dirty_context)
        if not handle.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION):
            contexts.remove(nbd.CONTEXT_BASE_ALLOCATION)
        survey = ExtentPass(self._guest_bytes, contexts, self.dirty_context)
        while (request := survey.next_request()) is not None:
            offset, length = request
            try:
                handle.block_status(length, offset, survey.take)
            except nbd.Error as error:
                raise self.failed(f"block status at {offset}", error) from error
            if not survey.advanced_beyond(offset):
                raise Unavailable(f"{self._where}: the server tells nothing about the extent at {offset}")
        return survey.result()

    def stream(self, data: Spans) -> Generator[Batch, None, None]:
        """These clusters in guest order; see `source.Source`."""
        if self._streaming:
            raise RuntimeError("one pass over an export at a time")
        pump = _Pump(self, data)
        self._streaming = True
        try:
            yield from pump.run()
        finally:
            self._streaming = False

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the guest's bytes at `offset`; zeros beyond the end of the disk."""
        if self._streaming:
            raise RuntimeError("random access while a pass over the export is running")
        end = max(0, min(len(view), self._guest_bytes - offset))
        view[end:] = bytes(len(view) - end)
        for start in range(0, end, BATCH_BYTES):
            length = min(BATCH_BYTES, end - start)
            try:
                view[start : start + length] = self.handle().pread(length, offset + start)
            except nbd.Error as error:
                raise self.failed(f"read of {length} bytes at {offset + start}", error) from error

    def handle(self) -> nbd.NBD:
        """The connection; a new one if a pass was given up in the middle."""
        if self._handle is None:
            self._handle = self._connect()
        return self._handle

    def drop(self) -> None:
        """Cut the connection whatever it is doing; its buffers are free afterwards."""
        self._handle = None  # libnbd closes the socket when the last reference goes

    def close(self) -> None:
        """Leave politely: QEMU ends an export only when its last client has gone."""
        handle = self._handle
        if handle is not None and handle.aio_is_ready():
            with contextlib.suppress(nbd.Error):  # a server that has gone needs no good-bye
                handle.aio_disconnect()
                deadline = time.monotonic() + _GOODBYE_S
                while handle.aio_is_processing() and time.monotonic() < deadline:
                    handle.poll(_POLL_MS)
        self.drop()

    def failed(self, what: str, error: nbd.Error) -> Unavailable:
        """The error to raise for a request that libnbd says failed."""
        return Unavailable(f"{self._where}: {what}: {error}")

    def _connect(self) -> nbd.NBD:
        handle = nbd.NBD()
        handle.set_export_name(self._export)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        if self.dirty_context:
            handle.add_meta_context(self.dirty_context)
        try:
            handle.connect_unix(self._socket)
        except nbd.Error as error:
            raise self.failed("cannot connect", error) from error
        return handle


class _Pump:
    """One pass: the thread that submits requests and collects what has come."""

    def __init__(self, source: NbdSource, data: Spans) -> None:
        self._source = source
        largest = int(source.handle().get_block_size(nbd.SIZE_MAXIMUM)) or BATCH_BYTES
        self._plan = batches(data, min(BATCH_BYTES, largest))
        self._pool = Pool()
        self._ready: queue.SimpleQueue[Batch | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._slices = _Slices()
        #: requests in flight: cookie → the batch it reads into
        self._requests: dict[int, Batch] = {}
        #: batches in flight in guest order, each with its number of open requests
        self._order: deque[Batch] = deque()
        self._open: dict[Batch, int] = {}

    def run(self) -> Generator[Batch, None, None]:
        """The batches in order; the thread ends with the generator."""
        thread = threading.Thread(target=self._work, name="nbd-reader", daemon=True)
        thread.start()
        done = False
        try:
            while (item := self._ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
                item.release()
            done = True
        finally:
            self._stop.set()
            self._pool.close()
            thread.join()
            if not done:
                self._source.drop()
            self._slices.release()

    def _work(self) -> None:
        try:
            self._pass()
        except nbd.Error as error:
            self._ready.put(self._source.failed("read", error))
        except BaseException as error:  # noqa: BLE001  # top of a thread: raised again by its owner
            self._ready.put(error)
        else:
            self._ready.put(None)

    def _pass(self) -> None:
        handle = self._source.handle()
        parts = next(self._plan, None)
        while parts is not None or self._order:
            while parts is not None and len(self._order) < BATCHES_IN_FLIGHT:
                batch = self._pool.take(wait=not self._order)
                if batch is None:
                    break
                batch.load(parts)
                self._submit(handle, batch)
                parts = next(self._plan, None)
            if self._stop.is_set():
                return
            handle.poll(_POLL_MS)
            self._collect(handle)

    def _submit(self, handle: nbd.NBD, batch: Batch) -> None:
        self._order.append(batch)
        self._open[batch] = 0
        end = self._source.guest_bytes
        for part in batch.parts:
            length = min(part.length, end - part.offset)
            stop = part.position + length
            if length < part.length:  # the last cluster of a disk of odd size
                batch.view[stop : part.position + part.length] = bytes(part.length - length)
            buffer = self._slices.get(batch, part.position, stop)
            self._requests[handle.aio_pread(buffer, part.offset)] = batch
            self._open[batch] += 1

    def _collect(self, handle: nbd.NBD) -> None:
        while self._requests and (cookie := handle.aio_peek_command_completed()) > 0:
            batch = self._requests[cookie]
            try:
                handle.aio_command_completed(cookie)
            except nbd.Error as error:
                first, last = batch.parts[0], batch.parts[-1]
                where = f"read between {first.offset} and {last.offset + last.length}"
                raise self._source.failed(where, error) from error
            del self._requests[cookie]
            self._open[batch] -= 1
        while self._order and not self._open[self._order[0]]:
            batch = self._order.popleft()
            del self._open[batch]
            self._ready.put(batch)


class _Slices:
    """libnbd's view of each place in each buffer that was ever read into, made once.

    `aio_pread` never gives up its reference to the buffer object (libnbd 1.14),
    so one per request would add up, and would keep the memory behind it alive.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Batch, int, int], tuple[memoryview, nbd.Buffer]] = {}

    def get(self, batch: Batch, start: int, stop: int) -> nbd.Buffer:
        """The buffer for these bytes of the batch."""
        key = (batch, start, stop)
        if key not in self._known:
            view = batch.memory[start:stop]
            self._known[key] = (view, nbd.Buffer.from_buffer(view))
        return self._known[key][1]

    def release(self) -> None:
        """Cut the views off from the memory, whoever still refers to them."""
        for view, _ in self._known.values():
            view.release()
        self._known.clear()
