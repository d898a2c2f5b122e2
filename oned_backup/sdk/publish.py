"""Folders that are written so that what has a finished name is complete and durable.

    data: write, fsync  →  manifest: temporary name, fsync, rename  →  fsync the folder
    →  rename the folder to its final name  →  fsync its parent

Everything beneath the root is reached through descriptors and never through a
symbolic link: whoever can write to a store cannot make us read or write beside
it. A failed fsync is final: the kernel may have dropped the data and report
success the next time, so nothing is ever synced twice; the file is given up.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from oned_backup import failpoints
from oned_backup.errors import Conflict, DataCorrupt, InvalidInput, NotFound
from oned_backup.sdk.store_folder import StoreFolder

if TYPE_CHECKING:
    from oned_backup.disk.filewriter import FileWriter

_READ_ONLY = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_EXCLUSIVE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
#: what opening without following links says of something that is not what it should be
_WRONG_KIND = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}


class Folder(StoreFolder):
    """A directory held open; names are single components. Use it as a context manager."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(path)
        self.descriptor = descriptor

    @classmethod
    def open(cls, path: Path) -> Self:
        """The directory at an absolute path that the administrator chose; links in it are followed."""
        return cls(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.descriptor)

    def folder(self, name: str) -> Folder:
        """The directory `name` in it; `NotFound` if there is nothing of that name."""
        path = self.path / _component(name)
        return Folder(self._open(name, _READ_ONLY | os.O_DIRECTORY), path)

    def make_folder(self, name: str, *, exist_ok: bool = False) -> Folder:
        """The new directory `name` (0700)."""
        with self._naming(name):
            try:
                os.mkdir(_component(name), 0o700, dir_fd=self.descriptor)
            except FileExistsError:
                if not exist_ok:
                    raise
        self.sync()  # also of one that is there: whoever made it may have died before this
        return self.folder(name)

    def names(self) -> list[str]:
        """The names of everything in it, sorted."""
        return sorted(os.listdir(self.descriptor))  # noqa: PTH208 - of a descriptor

    def has(self, name: str) -> bool:
        """Whether there is something of that name."""
        try:
            os.stat(_component(name), dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def open_file(self, name: str) -> int:
        """A descriptor of the regular file `name`; `NotFound`, `DataCorrupt` if it is something else."""
        descriptor = self._open(name, _READ_ONLY | os.O_NONBLOCK)  # a FIFO must not hang us
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DataCorrupt(f"{self.path / name} is not a regular file")
        return descriptor

    def write_file(
        self,
        name: str,
        chunks: Iterable[bytes | memoryview],
        *,
        begin: int = 0,
        head: Callable[[], Iterable[bytes | memoryview]] = tuple,
    ) -> int:
        """Write a new file and make its content durable; returns its size in bytes.

        The chunks go to offset `begin` and beyond; what precedes them is asked for last.
        """
        from oned_backup.disk.filewriter import FileWriter  # noqa: PLC0415 - readers need no data engine

        with self._naming(name):
            descriptor = os.open(_component(name), _EXCLUSIVE, 0o600, dir_fd=self.descriptor)
        try:
            writer = FileWriter(descriptor)
            end = _write_all(writer, begin, chunks)
            _write_all(writer, 0, head())
            writer.sync()
        finally:
            os.close(descriptor)
        return end

    def publish_file(self, name: str, data: bytes, *, replace: bool = False) -> None:
        """Make `data` appear under `name` at once and durably; without `replace`, `Conflict` if taken."""
        temporary = _component(f".{name}.{os.urandom(4).hex()}")
        try:
            self.write_file(temporary, [data])
            move = os.replace if replace else _move
            move(temporary, _component(name), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            self.remove(temporary)
            raise
        self.sync()

    def rename_folder(self, old: str, new: str) -> None:
        """Give a folder another name, durably; `Conflict` if that is taken."""
        failpoints.reach("rename.begun")
        try:
            # A directory cannot take the place of one that is not empty.
            os.rename(
                _component(old),
                _component(new),
                src_dir_fd=self.descriptor,
                dst_dir_fd=self.descriptor,
            )
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise Conflict(f"{self.path / new} exists already") from error
            raise
        failpoints.reach("rename.acted")
        self.sync()

    def remove(self, name: str) -> None:
        """Remove the file or the whole folder `name`; nothing happens if it is absent."""
        try:
            mode = os.stat(_component(name), dir_fd=self.descriptor, follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                import shutil  # noqa: PLC0415 - brings archive formats along

                shutil.rmtree(name, dir_fd=self.descriptor)
            else:
                os.unlink(name, dir_fd=self.descriptor)
        except FileNotFoundError:
            return

    def remove_if_empty(self, name: str) -> None:
        """Remove the folder `name` unless there is something in it."""
        try:
            os.rmdir(_component(name), dir_fd=self.descriptor)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT}:
                raise

    def sync(self) -> None:
        """Make the names in it durable."""
        os.fsync(self.descriptor)

    def _open(self, name: str, flags: int) -> int:
        path = self.path / _component(name)
        try:
            return os.open(name, flags, dir_fd=self.descriptor)
        except FileNotFoundError as error:
            raise NotFound(f"{path} is absent") from error
        except OSError as error:
            if error.errno in _WRONG_KIND:
                raise DataCorrupt(f"{path} is not what a store has there ({error.strerror})") from error
            error.filename = str(path)
            raise

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """An `OSError` within names the whole path."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.path / name)
            raise


def _move(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """Rename without replacing: by a hard link, or where there are none over a placeholder of ours."""
    try:
        try:
            os.link(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=False)
            os.unlink(source, dir_fd=src_dir_fd)
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}:
                raise
            os.close(os.open(target, _EXCLUSIVE, 0o600, dir_fd=dst_dir_fd))
            os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
    except FileExistsError as error:
        raise Conflict(f"{target} exists already") from error


def _write_all(writer: FileWriter, offset: int, chunks: Iterable[bytes | memoryview]) -> int:
    """Write the chunks from `offset` on; returns the offset that they end at."""
    for chunk in chunks:
        writer.write(offset, chunk)
        offset += len(chunk)
    return offset


def _component(name: str) -> str:
    """`name`, if it is a single path component."""
    if not name or "/" in name or "\0" in name or name in {".", ".."}:
        raise InvalidInput(f"'{name[:80]}' is not the name of a file")
    return name
