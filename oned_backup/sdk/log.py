"""What a driver says on stderr: log lines with a priority, and progress.

A line is `<3>` (error) to `<7>` (debug) and a text. The daemon may have died
meanwhile: a log line that nobody reads is no reason to fail. Values of secrets
that were read never appear in a line.
"""

from __future__ import annotations

import contextlib
import os
import time
from enum import IntEnum

#: longer lines are cut, so that one write is one line also when children write beside us
_MAX_LINE_BYTES = 4000
#: shorter secrets would turn whole texts into asterisks
_MIN_REDACTED = 4

_redacted: set[str] = set()


class Level(IntEnum):
    """The priorities of syslog that a driver uses."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


def write(level: Level, text: str) -> None:
    """One log line for each line of `text`."""
    for line in text.splitlines():
        write_raw(f"<{level.value}>{line}")


def write_raw(line: str) -> None:
    """A line as it is, secrets taken out."""
    data = redact(line).encode("utf-8", "replace")[:_MAX_LINE_BYTES]
    with contextlib.suppress(OSError):  # the daemon is gone: the work goes on
        os.write(2, data + b"\n")


def redact(text: str) -> str:
    """`text` with `***` in the place of every secret that this process has read."""
    for value in _redacted:
        text = text.replace(value, "***")
    return text


class Secret:
    """A value that prints as `***`; `reveal()` where it is really needed."""

    def __init__(self, value: str) -> None:
        self._value = value
        if len(value) >= _MIN_REDACTED:
            _redacted.add(value)

    def reveal(self) -> str:
        """The value itself; keep it out of argv, the environment and messages."""
        return self._value

    def __str__(self) -> str:
        return "***"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class ProgressLines:
    """Prints `PROGRESS done total` (bytes), at most once in `interval_s` seconds."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Tell how far the action is; cheap enough to call for every buffer."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._interval_s
            write_raw(f"PROGRESS {done} {total}")
