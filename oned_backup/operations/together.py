"""Several driver calls at a time on behalf of one operation: one progress, one cancellation, one failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TypeVar

from oned_backup.operations.caller import Caller
from oned_backup.operations.context import Context
from oned_backup.runner.run import Cancellation, Progress

Result = TypeVar("Result")


def call_together(
    context: Context,
    calls: Mapping[int, Callable[[Caller], Result]],
    *,
    at_a_time: int,
    expected_bytes: Mapping[int, int],
) -> dict[int, Result]:
    """What each call returned. The first one that fails ends all others, and is raised.

    `expected_bytes`: what the progress counts for a call until it tells its own total.
    """
    caller = context.caller
    progress = _Sum(caller.progress, expected_bytes)
    together = Cancellation()
    with (
        context.cancellation.waking(together.cancel),
        ThreadPoolExecutor(at_a_time, thread_name_prefix=context.operation.id) as pool,
    ):
        futures: dict[Future[Result], int] = {}
        for key, call in calls.items():
            own = replace(caller, cancellation=together, progress=progress.part(key))
            futures[pool.submit(call, own)] = key
        failed = None
        pending = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            broken = [future for future in done if future.exception() is not None]
            if broken and failed is None:
                failed = broken[0]
                together.cancel()
    if failed is not None:
        context.check_cancelled()
    return {futures[future]: future.result() for future in ([failed] if failed else futures)}


class _Sum:
    """Adds up the progress of calls that run side by side."""

    def __init__(self, report: Progress | None, expected_bytes: Mapping[int, int]) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._parts = {key: (0, total) for key, total in expected_bytes.items()}

    def part(self, key: int) -> Progress:
        """What one of the calls reports to."""

        def report(done: int, total: int) -> None:
            with self._lock:
                self._parts[key] = (done, total)
                if self._report is not None:
                    self._report(*map(sum, zip(*self._parts.values(), strict=True)))

        return report
