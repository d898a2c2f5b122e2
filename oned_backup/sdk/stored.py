"""A finished backup that lies in a folder: read its manifest, prove its files, open its disks.

For stores that are directories, or can be had as one. Nothing here writes.
What is absent beneath a backup that is there is damage, not absence.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from blake3 import blake3

from oned_backup.contract.documents import VerifiedBackup
from oned_backup.errors import DataCorrupt, NotFound
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest, StoredFile, parse_manifest
from oned_backup.sdk.files import BLOCKS_SUFFIX
from oned_backup.sdk.publish import Folder

if TYPE_CHECKING:
    from oned_backup.disk.chain import Layer

#: documents, NVRAM and TPM state have a few MB at most
MAX_SMALL_FILE_BYTES = 64 * 1024 * 1024


class Manifests:
    """The manifests of the backups in a folder, by id; each is read and proved once."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._read: dict[str, Manifest] = {}

    def __call__(self, backup_id: str) -> Manifest:
        """The manifest; `NotFound` for an absent backup, `DataCorrupt` for a damaged or foreign one."""
        if backup_id not in self._read:
            with self._folder.folder(backup_id) as stored, damage():
                data = stored.read_file(MANIFEST, MAX_SMALL_FILE_BYTES)
                manifest = parse_manifest(data, what=str(stored.path / MANIFEST))
                if manifest.id != backup_id:
                    raise DataCorrupt(f"{stored.path} holds backup {manifest.id}")
            self._read[backup_id] = manifest
        return self._read[backup_id]


@contextmanager
def damage() -> Iterator[None]:
    """Within a backup that exists, an absent file is `DataCorrupt`."""
    try:
        yield
    except NotFound as error:
        raise DataCorrupt(error.message) from error


def small_files(manifest: Manifest) -> tuple[StoredFile, ...]:
    """The documents and machine state of a backup: all its files but those of the disks."""
    of_disks = {name for disk in manifest.disks for name in (disk.file, disk.file + BLOCKS_SUFFIX)}
    return tuple(file for file in manifest.files if file.name not in of_disks)


def read_checked(stored: Folder, file: StoredFile) -> bytes:
    """The content of a small file; `DataCorrupt` unless it is what the manifest says."""
    with damage():
        data = stored.read_file(file.name, MAX_SMALL_FILE_BYTES)
    if len(data) != file.size_bytes or blake3(data).hexdigest() != file.blake3:
        raise DataCorrupt(f"{stored.path / file.name}: checksum does not match the manifest")
    return data


def open_layer(stack: ExitStack, folder: Folder, manifest: Manifest, disk_id: int) -> Layer:
    """A disk's file in one backup, for the data engine; `stack` keeps it open.

    The digests of its clusters are proved here, so that they can prove the rest.
    The paths lead to the files that were opened, whatever happens to their names.
    """
    from oned_backup.disk.chain import Layer  # noqa: PLC0415 - loads the data engine

    disk = manifest.disk(disk_id)
    file = manifest.file(disk.file) if disk else None
    if disk is None or file is None:
        raise DataCorrupt(f"backup {manifest.id}: its manifest lacks the file of disk {disk_id}")
    blocks = manifest.file(disk.file + BLOCKS_SUFFIX)
    stored = stack.enter_context(folder.folder(manifest.id))
    blocks_path = None
    if blocks is not None:
        read_checked_large(stored, blocks)
        blocks_path = _pin(stack, stored, blocks)
    return Layer(path=_pin(stack, stored, file), blocks=blocks_path, name=f"{manifest.id}/{file.name}")


def verify_backup(
    stored: Folder, manifest: Manifest, *, percent: int | None, advance: Callable[[int], None]
) -> VerifiedBackup:
    """What was read of one backup, and every file that is damaged, absent, too short or foreign.

    `percent`: of the clusters of each disk file that has digests; None: everything.
    `advance` is told the bytes of each file as it is done.
    """
    failures: list[tuple[str, str]] = []
    read_bytes = 0
    names = set(stored.names())
    known = {MANIFEST, *(file.name for file in manifest.files)}
    failures += [(name, "not in the manifest") for name in sorted(names - known)]
    for file in manifest.files:
        try:
            with ExitStack() as stack:
                read_bytes += _prove(stack, stored, manifest, file, percent)
        except DataCorrupt as error:
            failures.append((file.name, error.message))
        advance(file.size_bytes)
    return VerifiedBackup(manifest.id, read_bytes, tuple(failures))


def read_checked_large(stored: Folder, file: StoredFile) -> int:
    """Read a file of any size and prove it; returns its size, `DataCorrupt` names the difference."""
    with damage():
        descriptor = stored.open_file(file.name)
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        _check_size(descriptor, file)
        digest = blake3()
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            digest.update(view[:count])
    if digest.hexdigest() != file.blake3:
        raise DataCorrupt(f"{file.name}: checksum does not match the manifest")
    return file.size_bytes


def _prove(
    stack: ExitStack, stored: Folder, manifest: Manifest, file: StoredFile, percent: int | None
) -> int:
    blocks = manifest.file(file.name + BLOCKS_SUFFIX)
    if percent is None or blocks is None:
        return read_checked_large(stored, file)
    from oned_backup.disk.scrub import verify_blocks  # noqa: PLC0415 - loads the data engine

    path = _pin(stack, stored, file)
    read_checked_large(stored, blocks)
    failures = verify_blocks(path, _pin(stack, stored, blocks), percent)
    if failures:
        raise DataCorrupt(f"{file.name}: {'; '.join(map(str, failures[:8]))}")
    return file.size_bytes * percent // 100


def _pin(stack: ExitStack, stored: Folder, file: StoredFile) -> Path:
    """A path to this very file, of the right size."""
    with damage():
        descriptor = stored.open_file(file.name)
    stack.callback(os.close, descriptor)
    _check_size(descriptor, file)
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def _check_size(descriptor: int, file: StoredFile) -> None:
    size = os.fstat(descriptor).st_size
    if size != file.size_bytes:
        raise DataCorrupt(f"{file.name}: {size} bytes, the manifest says {file.size_bytes}")
