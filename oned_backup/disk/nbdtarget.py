"""A disk that is restored through an NBD server, perhaps on another machine.

Several connections write at a time, so that neither the server nor a long way to
it is waited for; which connection takes a piece is nobody's concern, because
pieces do not overlap. A server that does not say that its connections see each
other's writes gets one.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial

import nbd

from oned_backup.disk.buffers import BATCH_BYTES
from oned_backup.disk.target import ZERO_STEP, NbdExport, Target
from oned_backup.errors import InvalidInput, NoSpace, OnedBackupError, Unavailable

_CONNECTIONS = 8
#: after so much a connection has the server make things durable, lest all of it wait for the end
_FLUSH_BYTES = 256 << 20
#: servers may refuse to tell about more at a time
_STATUS_BYTES = 1 << 31

#: does something over a connection and says how many bytes were written
_Job = Callable[[nbd.NBD], int]


class NbdTarget(Target):
    """An export that is written to. What it had in its first `size` bytes is overwritten, the rest stays."""

    def __init__(self, place: NbdExport, size: int) -> None:
        self._place = place
        self._what = f"NBD export '{place.export}' on {place.socket}"
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._leaving = False
        self._jobs: queue.Queue[_Job | None] = queue.Queue(_CONNECTIONS // 2)
        self._first = self._connect()
        with self._explained():
            available = int(self._first.get_size())
            if available < size:
                raise InvalidInput(f"{self._what}: {size} bytes needed, the export has {available}")
            if self._first.is_read_only():
                raise InvalidInput(f"{self._what} cannot be written to")
            self._can_zero = bool(self._first.can_zero())
            self._can_flush = bool(self._first.can_flush())
            self._piece = min(BATCH_BYTES, int(self._first.get_block_size(nbd.SIZE_MAXIMUM)) or BATCH_BYTES)
            self._fresh = self._reads_as_zeros(size)
            shared = self._first.can_multi_conn()
        self._connected = 1
        self._start(self._first)
        # One that the server does not let in takes no work, and nobody waits for it.
        for _ in range(_CONNECTIONS - 1 if shared else 0):
            self._start(None)

    def write(self, offset: int, view: memoryview) -> None:
        """These bytes at that offset; they are copied."""
        while view:
            piece = bytes(view[: self._piece])
            self._put(partial(_write, offset=offset, data=piece))
            offset += len(piece)
            view = view[len(piece) :]

    def zero(self, start: int, end: int) -> None:
        """Let the server zero the range, which takes no space where it can do that; else write zeros."""
        if self._fresh:
            return
        step = ZERO_STEP if self._can_zero else self._piece
        while start < end:
            count = min(step, end - start)
            if self._can_zero:
                self._put(partial(_zero, offset=start, count=count))
            else:
                self._put(partial(_write, offset=start, data=bytes(count)))
            start += count

    def finish(self) -> None:
        """Make it durable. A failure is final."""
        self._jobs.join()
        self._raise_error()
        if self._can_flush:  # over one connection for all: that is what can_multi_conn promises
            with self._explained():
                self._first.flush()

    def abandon(self) -> None:
        """What still waits is not written."""
        self._error = self._error or Unavailable(f"{self._what}: given up")

    def close(self) -> None:
        """Leave the server once nothing is under way."""
        with self._lock:
            self._leaving = True
        for _ in range(self._connected):
            self._jobs.put(None)
        self._jobs.join()

    def _put(self, job: _Job) -> None:
        self._raise_error()
        self._jobs.put(job)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _start(self, handle: nbd.NBD | None) -> None:
        threading.Thread(target=self._serve, args=(handle,), name="nbd-writer", daemon=True).start()

    def _serve(self, handle: nbd.NBD | None) -> None:
        """One connection from its beginning to its end."""
        if handle is None:
            try:
                handle = self._connect()
            except OnedBackupError:  # the others do its work
                return
            with self._lock:
                if self._leaving:
                    return
                self._connected += 1
        unflushed = 0
        while (job := self._jobs.get()) is not None:
            try:
                if self._error is None:
                    with self._explained():
                        unflushed += job(handle)
                        if unflushed >= _FLUSH_BYTES and self._can_flush:
                            handle.flush()
                            unflushed = 0
            except BaseException as error:  # noqa: BLE001 - top of a thread: raised by who writes or finishes
                self._error = self._error or error
            self._jobs.task_done()
        with contextlib.suppress(nbd.Error):
            handle.shutdown()
        self._jobs.task_done()

    def _connect(self) -> nbd.NBD:
        handle = nbd.NBD()
        handle.set_export_name(self._place.export)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        with self._explained():
            handle.connect_unix(self._place.socket)
        return handle

    def _reads_as_zeros(self, size: int) -> bool:
        """Whether all of it reads as zeros already, as a new file does: then zeros need not be sent."""
        if not self._first.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION):
            return False
        offset = 0
        while offset < size:
            zeros = _zeros_from(self._first, offset, min(size - offset, _STATUS_BYTES))
            if not zeros:
                return False
            offset += zeros
        return True

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except nbd.Error as error:
            kind = NoSpace if error.errno == "ENOSPC" else Unavailable
            raise kind(f"{self._what}: {error.string}") from error


def _write(handle: nbd.NBD, offset: int, data: bytes) -> int:
    handle.pwrite(data, offset)
    return len(data)


def _zero(handle: nbd.NBD, offset: int, count: int) -> int:
    handle.zero(count, offset)
    return 0


def _zeros_from(handle: nbd.NBD, offset: int, length: int) -> int:
    """How many bytes from `offset` on are known to read as zeros."""
    zeros, only_zeros = 0, True

    def take(_context: str, _offset: int, entries: list[int], _error: object) -> None:
        nonlocal zeros, only_zeros
        for count, flags in zip(entries[::2], entries[1::2], strict=True):
            only_zeros = only_zeros and bool(flags & nbd.STATE_ZERO)
            zeros += count if only_zeros else 0

    handle.block_status(length, offset, take)
    return zeros
