"""How far the running operations are: kept in memory, read by long-polling clients."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace

_MOST_LINES = 200


@dataclass(frozen=True)
class RunningStep:
    """A step and its bytes; `total` is 0 where nobody knows. `version` counts every change.

    `message`: the last warning since bytes moved, such as why they do not.
    """

    step: str
    done: int
    total: int
    since: float
    lines: tuple[str, ...]
    message: str
    version: int


class ProgressBoard:
    """Where operations write how far they are."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._board: dict[str, RunningStep] = {}
        self._lines: dict[str, deque[str]] = {}
        self._version = 0

    def report(self, operation_id: str, step: str, done: int, total: int) -> None:
        """Enter a step and its bytes."""
        with self._changed:
            old = self._board.get(operation_id)
            same = old is not None and old.step == step
            since = old.since if old is not None and same and old.total else time.time()
            message = old.message if old is not None and same and done <= old.done else ""
            self._enter(operation_id, RunningStep(step, done, total, since, (), message, 0))

    def log(self, operation_id: str, line: str, *, warning: bool = False) -> None:
        """Add a line of the operation's log; only the last ones are kept."""
        with self._changed:
            self._lines.setdefault(operation_id, deque(maxlen=_MOST_LINES)).append(line)
            old = self._board.get(operation_id)
            if old is not None:
                self._enter(operation_id, replace(old, message=line if warning else old.message))

    def changed(self, operation_id: str, *, ended: bool = False) -> None:
        """Wake those who wait; `ended`: nothing more will be reported of the operation."""
        with self._changed:
            if ended:
                self._board.pop(operation_id, None)
                self._lines.pop(operation_id, None)
            self._version += 1
            self._changed.notify_all()

    def get(self, operation_id: str) -> RunningStep | None:
        """How far the operation is; None if it does not run."""
        with self._changed:
            return self._board.get(operation_id)

    def wait(self, seen: int, timeout_s: float) -> int:
        """The board's version once it is not `seen` any more, at the latest after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, timeout_s)
            return self._version

    def _enter(self, operation_id: str, progress: RunningStep) -> None:
        self._version += 1
        lines = tuple(self._lines.get(operation_id, ()))
        self._board[operation_id] = replace(progress, lines=lines, version=self._version)
        self._changed.notify_all()
