"""A file's bytes from some offset on, as they are sent without rsync: hashed, and no faster than allowed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence

from oned_backup.errors import Unavailable
from oned_backup.rsync.failures import NotTheLink
from oned_backup.sdk.files import BackupFile, Chunk

_UNITS = {"": 1 << 10, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_ZEROS = bytes(1 << 20)
_PIECE = 1 << 17


def bytes_per_second(options: Sequence[str]) -> float | None:
    """What rsync's option --bwlimit means; None without one."""
    for option in reversed(options):
        name, _, value = option.partition("=")
        if name == "--bwlimit":
            number = value.rstrip("KMGkmg")
            return float(number) * _UNITS[value[len(number) :].lower()] or None
    return None


class Pace:
    """Waits so that no more goes through in a second than `limit` bytes; None: as fast as it can."""

    def __init__(self, limit: float | None) -> None:
        self._limit = limit
        self._next = time.monotonic()

    def wait(self, size: int) -> None:
        """Wait until `size` more bytes may go."""
        if self._limit is not None:
            now = time.monotonic()
            self._next = max(self._next, now) + size / self._limit
            time.sleep(self._next - now)


class Rest:
    """Iterate for the bytes of a file from `begin` on; all of it is read, and `digest` is of all of it.

    Where its head belongs, which is known last, there are zeros.
    """

    def __init__(self, file: BackupFile, begin: int, pace: Pace) -> None:
        self._file = file
        self._begin = begin
        self._pace = pace
        self._hash = hashlib.sha256()
        self._whole = False

    def __iter__(self) -> Iterator[Chunk]:
        position = self._file.head_bytes
        for start in range(0, position, len(_ZEROS)):
            self._hash.update(_ZEROS[: position - start])
        try:
            for chunk in self._file.chunks():
                self._hash.update(chunk)
                rest = memoryview(chunk)[max(0, self._begin - position) :]
                position += len(chunk)
                for start in range(0, len(rest), _PIECE):
                    piece = rest[start : start + _PIECE]
                    self._pace.wait(len(piece))
                    yield piece
        except Unavailable as error:
            raise NotTheLink(error.message, hint=error.hint) from error
        self._whole = True

    def require_whole(self) -> None:
        """Raise `Unavailable` if whoever took the bytes stopped before the end."""
        if not self._whole:
            raise Unavailable(f"{self._file.name}: the server stopped receiving")

    @property
    def digest(self) -> str:
        """The SHA-256 of the file without its head, in hex."""
        return self._hash.hexdigest()
