"""The backup's files as readable streams of known size, whether they exist or are made as they are read.

Order: the small files, then per disk its image and the image's `.blocks`
file, and `manifest.json` last: it can only be written once everything else has
been read, because it lists the checksums of what was really read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from blake3 import blake3

from oned_backup import failpoints
from oned_backup.contract.exports import DiskExport, Exports
from oned_backup.contract.provenance import manifest_of
from oned_backup.errors import DriverBug, DriverFailed, InvalidInput, Unavailable
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import StoredFile, dump_manifest

if TYPE_CHECKING:
    from oned_backup.disk.image import VirtualImage
    from oned_backup.disk.onepass import OnePass
    from oned_backup.sdk.call import Call

#: beside the file of a disk: the digests of its clusters
BLOCKS_SUFFIX = ".blocks"
_READ_BYTES = 1 << 20
#: hardly any disk gets smaller than this part of itself
_COMPRESSED_PART = 8

Chunk = bytes | memoryview


@dataclass
class BackupFile:
    """A file to store. Read `chunks()` once, to the end; a chunk is valid until the next one.

    Where the store compresses, the size of an image and of its digests is the most
    that it can be until it was read. The first `head_bytes` bytes of a compressed
    image are known last: `chunks()` has what follows them, `head()` gives them.
    """

    name: str
    size_bytes: int
    _source: Callable[[], Iterable[Chunk]]
    #: checksum of what was read; empty before the end
    blake3: str = ""
    _hash_of: Callable[[], str] | None = None
    _advance: Callable[[int], None] = field(default=lambda _: None)
    head_bytes: int = 0
    #: of a compressed image: the size that it would have
    uncompressed_bytes: int = 0
    _head: Callable[[], Iterable[Chunk]] = tuple
    _size_of: Callable[[], int] | None = None

    def stored(self) -> StoredFile:
        """Its entry in the manifest, when it was read to the end."""
        return StoredFile(self.name, self.size_bytes, self.blake3, self.head_bytes, self.uncompressed_bytes)

    def head(self) -> Iterable[Chunk]:
        """The first `head_bytes` bytes of the file, after `chunks()` has come to its end."""
        return self._head()

    def chunks(self) -> Iterator[Chunk]:
        """The content from `head_bytes` on, in order; raises if it is not as long as it should be."""
        own_hash = None if self._hash_of else blake3()
        done = self.head_bytes
        for chunk in self._source():
            if own_hash is not None:
                own_hash.update(chunk)
            size = len(chunk)
            yield chunk
            done += size
            self._advance(size)
            if self.name.startswith("disk."):
                failpoints.reach("disk.chunk")
        expected = self._size_of() if self._size_of else self.size_bytes
        if done != expected:
            raise Unavailable(f"{self.name}: {done} bytes could be read, {expected} were announced")
        self._advance(self.size_bytes - expected + self.head_bytes)
        self.size_bytes = expected
        self.blake3 = self._hash_of() if self._hash_of else own_hash.hexdigest() if own_hash else ""


class BackupFiles:
    """All files of the backup at hand: iterate, and read each file before the next.

    Opening it looks at every disk, so that `total_bytes` (without the manifest)
    is known before anything is stored. Progress is reported as chunks are read.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._stack = ExitStack()
        self._done = 0
        try:
            self._files = list(self._open())
        except BaseException:
            self._stack.close()
            raise
        self.total_bytes = sum(file.size_bytes for file in self._files)
        #: with less room than this there is no point in beginning
        self.least_bytes = sum(
            file.size_bytes // (_COMPRESSED_PART if file.uncompressed_bytes else 1) for file in self._files
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __iter__(self) -> Iterator[BackupFile]:
        for file in self._files:
            yield file
            if not file.blake3:
                raise DriverBug(f"{file.name}: the driver did not read it to the end")
        yield self.manifest()

    @property
    def files(self) -> Sequence[BackupFile]:
        """All files but the manifest, for who can read several at a time."""
        return self._files

    def manifest(self) -> BackupFile:
        """The manifest, once all other files were read to their end; else `DriverBug`."""
        unread = next((file.name for file in self._files if not file.blake3), None)
        if unread is not None:
            raise DriverBug(f"{unread}: the driver did not read it to the end")
        data = self._manifest_of([file.stored() for file in self._files])
        return BackupFile(MANIFEST, len(data), lambda: [data])

    @property
    def manifest_bytes(self) -> int:
        """The size that the manifest will have: digests are all of one length."""
        return len(self._manifest_of([replace(file.stored(), blake3="0" * 64) for file in self._files]))

    def _manifest_of(self, stored: Sequence[StoredFile]) -> bytes:
        return dump_manifest(self._manifest(stored))

    def _open(self) -> Iterator[BackupFile]:
        """All files but the manifest; what they need is kept open by the stack."""
        exports = self._exports
        for name in exports.files:
            yield self._plain(self._call.source_dir / name, name)
        for disk in exports.disks:
            yield from self._disk(disk)

    def _manifest(self, stored: Sequence[StoredFile]) -> Mapping[str, Any]:
        """The `backup` object of manifest.json, when all other files were read."""
        return manifest_of(self._call.request, self._exports, stored)

    @property
    def _exports(self) -> Exports:
        exports = self._call.request.exports
        if exports is None:
            raise InvalidInput(f"request: {self._call.action} needs the section EXPORTS")
        return exports

    def _advance(self, size: int) -> None:
        self._done += size
        self._call.progress(self._done, self.total_bytes)

    def _plain(self, path: Path, name: str) -> BackupFile:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DriverFailed(f"{name} was announced, but {path} is not there") from error
        self._stack.callback(os.close, descriptor)
        return BackupFile(
            name,
            os.fstat(descriptor).st_size,
            lambda: _read(descriptor),
            _advance=self._advance,
        )

    def _disk(self, disk: DiskExport) -> Iterator[BackupFile]:
        if disk.path:
            yield from self._staged(disk, Path(disk.path), Path(disk.path + BLOCKS_SUFFIX))
            return
        from oned_backup.disk.image import open_export  # noqa: PLC0415 - staged backups need no NBD

        yield from self._image(
            disk.file, open_export(disk.nbd_socket, disk.nbd_export, dirty_bitmap=disk.dirty_bitmap)
        )

    def _staged(self, disk: DiskExport, path: Path, blocks: Path) -> Iterator[BackupFile]:
        if self._call.zstd_level is not None:
            from oned_backup.disk.chain import Layer  # noqa: PLC0415 - loads the data engine
            from oned_backup.disk.merge import open_merged  # noqa: PLC0415

            layer = Layer(path, blocks if blocks.exists() else None, disk.file)
            yield from self._image(disk.file, open_merged([layer], full=disk.type is BackupType.FULL))
            return
        yield self._plain(path, disk.file)
        if blocks.exists():
            yield self._plain(blocks, disk.file + BLOCKS_SUFFIX)

    def _image(self, name: str, image: VirtualImage) -> Iterator[BackupFile]:
        """The file of a disk and its digests; the image is closed with everything else."""
        self._stack.enter_context(image)
        level = self._call.zstd_level
        stored: OnePass = image
        if level is not None:
            stored = self._stack.enter_context(image.compressed(level))
        yield self._content(name, stored)
        yield self._digests(name, stored)

    def _content(self, name: str, image: OnePass) -> BackupFile:
        return BackupFile(
            name,
            image.size_bytes,
            image.chunks,
            _hash_of=lambda: image.blake3,
            _advance=self._advance,
            head_bytes=image.head_bytes,
            uncompressed_bytes=image.uncompressed_bytes,
            _head=image.head,
            _size_of=lambda: image.size_bytes,
        )

    def _digests(self, name: str, image: OnePass) -> BackupFile:
        return BackupFile(
            name + BLOCKS_SUFFIX,
            image.blocks_size_bytes,
            lambda: _pieces(image.blocks_bytes()),
            _advance=self._advance,
            _size_of=lambda: image.blocks_size_bytes,
        )


def _read(descriptor: int) -> Iterator[bytes]:
    offset = 0
    while data := os.pread(descriptor, _READ_BYTES, offset):
        offset += len(data)
        yield data


def _pieces(data: Chunk | Iterable[Chunk]) -> Iterable[Chunk]:
    return [data] if isinstance(data, bytes | memoryview) else data
