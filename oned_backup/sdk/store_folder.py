"""A folder of a store, to be read: all that the actions that read want of a store.

A directory is one (`sdk.publish.Folder`). A store that is no directory shows its objects as such
folders, one in the other: the store has VMs by their numbers, these have backups, these have files.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from oned_backup.errors import DataCorrupt


class StoreFolder:
    """Give a class of your own the four methods that raise here. Use it as a context manager.

    Whoever cannot tell raises `Unavailable`; absent is what was looked for and not found.
    """

    def __init__(self, path: Path) -> None:
        #: for messages only
        self.path = path

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open here."""

    def names(self) -> list[str]:
        """The names of everything in it, sorted."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether there is something of that name."""
        raise NotImplementedError

    def folder(self, name: str) -> StoreFolder:
        """The folder `name` in it; `NotFound` if there is nothing of that name."""
        raise NotImplementedError

    def open_file(self, name: str) -> int:
        """A new descriptor of the file `name`, at its beginning; it is read in any order, and closed.

        `NotFound`; `DataCorrupt` if it is no file. Of an object it may be a temporary file with its content.
        """
        raise NotImplementedError

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """The content of a small file; `DataCorrupt` if it is larger than `max_bytes`."""
        with os.fdopen(self.open_file(name), "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise DataCorrupt(f"{self.path / name} has more than {max_bytes} bytes")
        return data
