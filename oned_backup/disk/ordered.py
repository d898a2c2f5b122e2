"""Several threads fill buffers; one consumer gets them in the order of the plan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

from oned_backup.disk.buffers import Batch, Pool

Job = TypeVar("Job")


class OrderedFill(Generic[Job]):
    """Runs `fill(job, batch)` for each job of the plan in threads of its own.

    The plan is advanced by one thread at a time. A buffer is taken together
    with the job, so the oldest job always has one and nothing can block it.
    """

    def __init__(self, plan: Iterator[Job], fill: Callable[[Job, Batch], None], *, threads: int) -> None:
        self._plan = plan
        self._fill = fill
        self._pool = Pool()
        self._next_job = threading.Lock()
        self._changed = threading.Condition()
        self._issued = 0
        self._filled: dict[int, Batch] = {}
        self._error: BaseException | None = None
        self._running = threads
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name=f"fill-{number}", daemon=True)
            for number in range(threads)
        ]

    def run(self) -> Generator[Batch, None, None]:
        """The filled batches in order; each is let go when the next one is asked for."""
        for thread in self._threads:
            thread.start()
        try:
            number = 0
            while (batch := self._wait_for(number)) is not None:
                yield batch
                batch.release()
                number += 1
        finally:
            self._stopped = True
            self._pool.close()
            for thread in self._threads:
                thread.join()

    def _wait_for(self, number: int) -> Batch | None:
        with self._changed:
            while number not in self._filled and self._running and self._error is None:
                self._changed.wait()
            if self._error is not None:
                raise self._error
            return self._filled.pop(number, None)

    def _work(self) -> None:
        error = None
        try:
            while self._one():
                pass
        except BaseException as caught:  # noqa: BLE001  # top of a thread: raised by the consumer
            error = caught
        with self._changed:
            self._running -= 1
            self._error = self._error or error
            self._changed.notify_all()

    def _one(self) -> bool:
        with self._next_job:
            if self._stopped or self._error is not None:
                return False
            batch = self._pool.take(wait=True)
            if batch is None:
                return False
            job = next(self._plan, None)
            if job is None:
                return False
            number = self._issued
            self._issued += 1
        self._fill(job, batch)
        with self._changed:
            self._filled[number] = batch
            self._changed.notify_all()
        return True
