"""The backup's files as a read-only directory, for programs that insist on paths (restic, rsync).

    with call.files() as files, mounted(files, directory) as shown:
        run([..., str(shown)])

Nothing is copied: a file's bytes are computed when they are read. So each file
can be read once, from its beginning to its end; several files may be read at
the same time. A reader that goes by name never waits for something that it
has not read yet: files whose names follow `manifest.json` are small documents
and are kept in memory, `disk.0.3.blocks` waits until `disk.0.3` was read to
its end, and `manifest.json`, whose size is known beforehand, for all of them.

If a file cannot be produced its reader gets EIO, and `mounted` raises what
happened; it also raises if something was shown that nobody read to its end.
Whatever was published by then does not count.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from oned_backup.errors import Cancelled, DriverBug, Unavailable
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.sdk import fuse
from oned_backup.sdk.files import BLOCKS_SUFFIX, BackupFile, Chunk

#: documents, NVRAM and TPM state have a few MB at most
_MAX_KEPT_BYTES = 64 * 1024 * 1024
#: the last piece of a file, if it is no larger, can be read again
_MAX_TAIL_BYTES = 1024 * 1024


class Files(Protocol):
    """What can be shown: a `BackupFiles`, or what makes files as it does."""

    @property
    def files(self) -> Sequence[BackupFile]:
        """All files but the manifest."""

    @property
    def manifest_bytes(self) -> int:
        """The size that the manifest will have."""

    def manifest(self) -> BackupFile:
        """The manifest; can be had when all files were read to their end."""


@contextmanager
def mounted(files: Files, directory: Path) -> Iterator[Path]:
    """`directory` (made if it is absent) as a view of `files`; unmounted at the end, however it comes.

    `Misconfigured` where there is no FUSE. What happened in a file is raised in
    place of what its reader made of that.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fuse.unmount(directory)  # what a killed driver may have left
    view = _View(files)
    mount = fuse.Mount(directory, view.entries)
    try:
        yield directory
    except Cancelled:
        raise
    except BaseException as error:
        if view.error is not None:
            raise view.error from error
        raise
    else:
        view.check_read()
    finally:
        view.stop()
        mount.close()
        directory.rmdir()


class _View:
    """The entries of the directory, and the first thing that went wrong in one of them."""

    def __init__(self, files: Files) -> None:
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.stopped = False
        self._files = files
        self._shown: dict[str, _Streamed] = {}
        kept: dict[str, fuse.Entry] = {}
        for file in files.files:
            if file.name > MANIFEST or not file.size_bytes:
                kept[file.name] = _Kept(_content(file))
            else:
                self._shown[file.name] = _Streamed(
                    self, file.name, file.size_bytes, file.chunks, after=self._before(file.name)
                )
        self._shown[MANIFEST] = _Streamed(
            self, MANIFEST, files.manifest_bytes, self._manifest, after=tuple(self._shown.values())
        )
        self.entries: dict[str, fuse.Entry] = {**self._shown, **kept}

    def check_read(self) -> None:
        """Raise what went wrong, or name what was not read to its end."""
        if self.error is not None:
            raise self.error
        for name, file in self._shown.items():
            if not file.complete:
                raise DriverBug(f"{name}: was shown, but nobody read it to its end")

    def failed(self, error: BaseException) -> None:
        """Note the first error, and let go whoever waits."""
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()

    def stop(self) -> None:
        """Let go whoever waits."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def _before(self, name: str) -> tuple[_Streamed, ...]:
        image = self._shown.get(name.removesuffix(BLOCKS_SUFFIX)) if name.endswith(BLOCKS_SUFFIX) else None
        return (image,) if image is not None else ()

    def _manifest(self) -> Iterator[Chunk]:
        file = self._files.manifest()
        if file.size_bytes != self._files.manifest_bytes:
            raise DriverBug(
                f"{MANIFEST} has {file.size_bytes} bytes, {self._files.manifest_bytes} were announced"
            )
        return file.chunks()


class _Streamed:
    """A file that is read once, in order."""

    def __init__(
        self,
        view: _View,
        name: str,
        size_bytes: int,
        chunks: Callable[[], Iterator[Chunk]],
        *,
        after: Sequence[_Streamed],
    ) -> None:
        self.size_bytes = size_bytes
        self.complete = False
        self._view = view
        self._name = name
        self._chunks = chunks
        self._after = after
        self._stream: Iterator[Chunk] | None = None
        self._chunk = memoryview(b"")
        self._chunk_at = 0

    def read(self, offset: int, size: int) -> fuse.Reply:
        """The next `size` bytes; also what lies in the chunk at hand."""
        try:
            return self._read(offset, min(size, self.size_bytes - offset))
        except BaseException as error:
            self._view.failed(error)
            raise

    def _read(self, offset: int, size: int) -> fuse.Reply:
        if self._stream is None:
            self._wait()
            self._stream = self._chunks()
        if size <= 0:
            return b""
        if not self._chunk_at <= offset <= self._chunk_at + len(self._chunk):
            raise DriverBug(f"{self._name}: was read out of order, at {offset} after {self._chunk_at}")
        start = offset - self._chunk_at
        if start + size <= len(self._chunk):
            result: fuse.Reply = self._chunk[start : start + size]
        else:
            result = self._gather(start, size)
        if offset + size == self.size_bytes:
            result = bytes(result)
            self._finish()
        return result

    def _gather(self, start: int, size: int) -> bytes:
        """Bytes from the chunk at hand and those that follow it."""
        found = bytearray(self._chunk[start : start + size])
        while len(found) < size:
            self._advance()
            found += self._chunk[: size - len(found)]
        return bytes(found)

    def _advance(self) -> None:
        assert self._stream is not None  # noqa: S101 - for the type checker
        self._chunk_at += len(self._chunk)
        self._chunk = memoryview(b"")
        chunk = next(self._stream, None)
        if chunk is None:
            raise Unavailable(
                f"{self._name}: {self._chunk_at} bytes could be read, {self.size_bytes} were announced"
            )
        self._chunk = memoryview(chunk).cast("B")

    def _finish(self) -> None:
        """See that the stream has ended too: only then is its checksum there."""
        assert self._stream is not None  # noqa: S101 - for the type checker
        if len(self._chunk) > _MAX_TAIL_BYTES:
            self._chunk_at, self._chunk = self.size_bytes, memoryview(b"")
        self._chunk = memoryview(bytes(self._chunk))  # the producer will use the buffer again
        for chunk in self._stream:
            if len(chunk):
                raise Unavailable(f"{self._name}: is longer than the {self.size_bytes} bytes announced")
        with self._view.changed:
            self.complete = True
            self._view.changed.notify_all()

    def _wait(self) -> None:
        view = self._view
        with view.changed:
            view.changed.wait_for(
                lambda: view.stopped or view.error is not None or all(file.complete for file in self._after)
            )
            if view.stopped or view.error is not None:
                raise Unavailable(f"{self._name}: the files before it were not read to their end")


class _Kept:
    """A document that is in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def read(self, offset: int, size: int) -> fuse.Reply:
        return self._data[offset : offset + size]


def _content(file: BackupFile) -> bytes:
    if file.size_bytes > _MAX_KEPT_BYTES:
        raise DriverBug(f"{file.name}: {file.size_bytes} bytes are too many for a document")
    return b"".join(bytes(chunk) for chunk in file.chunks())
