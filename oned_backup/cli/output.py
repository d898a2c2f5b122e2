"""Tables, sizes and times for people; JSON for scripts."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from oned_backup.cli.table import table_lines

_MIB = 1024 * 1024
_NOT_FOLDED = 100_000
#: within so many seconds a day and a month name one day
_RECENT_S = 300 * 86_400


def print_json(value: Any) -> None:
    """The value as JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def say(text: str) -> None:
    """A line on stdout."""
    sys.stdout.write(f"{text}\n")


def warn(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"{text}\n")


def complain(text: str, hint: str | None) -> None:
    """An error on stderr: one line, and what to do on a second."""
    warn(f"oned-backup: {' '.join(text.split())}")
    if hint:
        warn(f"  {hint}")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str = "") -> None:
    """A table on stdout (see `table_lines`), as wide as terminal or $COLUMNS; in a pipe a row is a line."""
    if not rows:
        if empty:
            warn(empty)
        return
    width = shutil.get_terminal_size((_NOT_FOLDED, 24)).columns
    lines = table_lines(columns, rows, width)
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def print_fields(fields: Sequence[tuple[str, Any]]) -> None:
    """`name  value` lines, aligned; those without a value are left out."""
    shown = [(name, value) for name, value in fields if value not in {None, ""}]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        say(f"{name:<{width}}  {value}")


def counted(count: int, noun: str) -> str:
    """A number of things: 1 backup, 2 backups."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size(count: float | None) -> str:
    """Bytes for people: 1.5 GiB."""
    if count is None:
        return ""
    units = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    value = float(count)
    for unit in units:
        if abs(value) < 1024 or unit == units[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return ""


def size_mb(count: float | None) -> str:
    """Megabytes for people."""
    return "" if count is None else size(count * _MIB)


def when(seconds: float | None) -> str:
    """A local time, empty for none."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def minute(seconds: float | None) -> str:
    """A local time to the minute, `never` for none; with its year if that is not plain: backups live long."""
    text = when(seconds)[:16] or "never"
    is_recent = seconds is not None and -_RECENT_S < time.time() - seconds < _RECENT_S
    return text[5:] if is_recent else text


def duration(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def age(seconds: float) -> str:
    """How long ago a time was, in its largest unit: 3 d."""
    passed = max(time.time() - seconds, 0)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if passed >= length:
            return f"{passed // length:.0f} {unit}"
    return f"{passed:.0f} s"
