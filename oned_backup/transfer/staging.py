"""Exports as real files, for datastore drivers that cannot read NBD."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from oned_backup.contract.exports import DiskExport, Exports
from oned_backup.disk.image import open_export
from oned_backup.sdk.files import BLOCKS_SUFFIX


def staged(exports: Exports, directory: Path, progress: Callable[[int, int], None]) -> Exports:
    """The same exports, each disk written to `directory` with its `.blocks` beside it."""
    return replace(exports, disks=tuple(_stage(disk, directory, progress) for disk in exports.disks))


def _stage(disk: DiskExport, directory: Path, progress: Callable[[int, int], None]) -> DiskExport:
    path = directory / disk.file
    with open_export(disk.nbd_socket, disk.nbd_export, dirty_bitmap=disk.dirty_bitmap) as image:
        _write(path, _counted(image.chunks(), image.size_bytes, progress))
        _write(Path(f"{path}{BLOCKS_SUFFIX}"), image.blocks_bytes())
    return replace(disk, path=str(path), nbd_socket="", nbd_export="", dirty_bitmap="")


def _counted(
    chunks: Iterable[memoryview], total: int, progress: Callable[[int, int], None]
) -> Iterator[memoryview]:
    done = 0
    for chunk in chunks:
        yield chunk
        done += len(chunk)
        progress(done, total)


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
    finally:
        os.close(descriptor)
