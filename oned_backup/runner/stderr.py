"""What a driver says on stderr: log lines, progress, and the message of its end.

    <4>cannot read the change time, using the clock's     <3> error … <7> debug, as syslog(3)
    PROGRESS 1048576 8589934592                           bytes done, bytes in all
    store /srv/b: 12 GB needed, 3 GB free                 the last line is the message

Lines are cut at 16 KiB before and 4 KiB after secrets are struck out; characters that
could confuse a terminal or a log are replaced. Only the first `MAX_LINES` lines are
passed on. After `CAREFUL_LINES`, empty ones and progress included, only the end of
each piece is looked at, so that a flood costs little time and no memory.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable

MAX_LINES = 2000
CAREFUL_LINES = 20_000
TAIL_LINES = 40
LINE_BYTES = 16 * 1024
SHOWN_CHARACTERS = 4 * 1024
DEFAULT_LEVEL = 6

_LEVEL = re.compile(r"<([0-7])>")
_PROGRESS = re.compile(r"PROGRESS ([0-9]{1,18}) ([0-9]{1,18})\s*")
_CONTROL = dict.fromkeys((*range(32), *range(127, 160), 0x2028, 0x2029), "\N{REPLACEMENT CHARACTER}")
_CONTROL[ord("\t")] = " "

#: (syslog level, line)
Log = Callable[[int, str], None]
#: (done, total) in bytes
Progress = Callable[[int, int], None]


class StderrReader:
    """Feed it stderr as it comes; it calls `log(level, text)` and `progress(done, total)`."""

    def __init__(
        self, *, secrets: Iterable[str] = (), log: Log | None = None, progress: Progress | None = None
    ) -> None:
        self._secrets = redactions(secrets)
        self._log = log
        self._progress = progress
        self._line = bytearray()
        self._lines = 0
        self._seen = 0
        self._dropped = 0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)

    @property
    def message(self) -> str:
        """The last line that was neither empty nor progress; empty if there was none."""
        return self._tail[-1] if self._tail else ""

    def feed(self, piece: bytes) -> None:
        """Take the next bytes, cut anywhere."""
        if self._seen < CAREFUL_LINES:
            lines = piece.split(b"\n")
        else:
            lines = piece.rsplit(b"\n", TAIL_LINES)
            if len(lines) > TAIL_LINES:
                self._dropped += lines[0].count(b"\n")
                lines[0] = lines[0].rpartition(b"\n")[2]
        self._seen += len(lines) - 1
        for line in lines[:-1]:
            self._append(line)
            self._end_line()
        self._append(lines[-1])

    def close(self) -> None:
        """Take the end of the stream: a last line without a newline counts."""
        if self._line:
            self._end_line()
        if self._dropped and self._log is not None:
            self._log(4, f"{self._dropped} further lines were not kept")

    def _append(self, part: bytes) -> None:
        self._line += part[: LINE_BYTES - len(self._line)]

    def _end_line(self) -> None:
        line = redact(self._line.decode("utf-8", "replace"), self._secrets)
        self._line.clear()
        found = _PROGRESS.fullmatch(line)
        if found:
            if self._progress is not None:
                self._progress(int(found[1]), int(found[2]))
            return
        match = _LEVEL.match(line)
        level = int(match[1]) if match else DEFAULT_LEVEL
        text = line[match.end() if match else 0 :].rstrip().translate(_CONTROL)
        if len(text) > SHOWN_CHARACTERS:
            text = text[:SHOWN_CHARACTERS] + " …"
        if not text:
            return
        self._tail.append(text)
        self._lines += 1
        if self._lines > MAX_LINES:
            self._dropped += 1
        elif self._log is not None:
            self._log(level, text)


def redactions(secrets: Iterable[str]) -> tuple[str, ...]:
    """What to strike out for these secrets: each whole and by line, the longest first.

    Values below four characters are left: striking them out would spoil every text
    and hide nothing.
    """
    parts = {part for secret in secrets for part in (secret.strip(), *map(str.strip, secret.splitlines()))}
    return tuple(sorted((part for part in parts if len(part) >= 4), key=len, reverse=True))


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` with every secret (see `redactions`) replaced by `***`."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
