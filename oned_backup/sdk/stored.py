"""A finished backup that lies in a folder: read its manifest, prove its files, open its disks.

For stores that are directories, or can be had as one. Nothing here writes.
What is absent beneath a backup that is there is damage, not absence.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from blake3 import blake3

from oned_backup.contract.documents import VerifiedBackup
from oned_backup.errors import DataCorrupt, NotFound
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest, StoredFile, parse_manifest
from oned_backup.sdk import opennebula
from oned_backup.sdk.files import BLOCKS_SUFFIX
from oned_backup.sdk.store_folder import StoreFolder

if TYPE_CHECKING:
    from oned_backup.disk.chain import Layer

#: documents, NVRAM and TPM state have a few MB at most
MAX_SMALL_FILE_BYTES = 64 * 1024 * 1024
#: blake3 needs this much at a time to use several threads well
_READ_BYTES = 8 * 1024 * 1024

#: is told how many more bytes were read
Advance: TypeAlias = Callable[[int], None]


class Manifests:
    """The manifests of the backups in a folder, by id; each is read and proved once.

    `catalogue`: texts of manifests. They stand in for those that are lost or damaged, of backups that are
    there; `say` is told of each.
    """

    def __init__(
        self,
        folder: StoreFolder,
        catalogue: Iterable[str] = (),
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder = folder
        self._catalogue = catalogue
        self._say = say
        #: what is wrong with those for which the catalogue stood in, by id
        self.lost: dict[str, str] = {}
        self._read: dict[str, Manifest] = {}

    def __call__(self, backup_id: str) -> Manifest:
        """The manifest; `NotFound` for an absent backup, `DataCorrupt` for a damaged or foreign one.

        One of OpenNebula's gets a manifest that is made up (see `sdk.opennebula`).
        """
        if backup_id not in self._read:
            with self._folder.folder(backup_id) as stored, damage():
                if opennebula.may_be_foreign(backup_id) and not stored.has(MANIFEST):
                    return self._made_up(backup_id)
                try:
                    manifest = read_manifest(stored, backup_id)
                except (DataCorrupt, NotFound, OSError) as error:
                    known = self._known(backup_id)
                    if known is None or (isinstance(error, OSError) and error.errno != errno.EIO):
                        raise
                    self.lost[backup_id] = f"{error}; the daemon's catalogue has what was in it"
                    self._say(f"backup {backup_id}: {self.lost[backup_id]}")
                    manifest = known
            self._read[backup_id] = manifest
        return self._read[backup_id]

    def _known(self, backup_id: str) -> Manifest | None:
        """What the catalogue has of a backup."""
        for text in self._catalogue:
            with suppress(DataCorrupt):
                manifest = parse_manifest(text)
                if manifest.id == backup_id:
                    return manifest
        return None

    def standing_for(self, backup_id: str) -> Manifest | None:
        """The finished backup that stands for one that was merged; None if none that can be read does."""
        for name in self._folder.names():
            if not name.startswith("."):
                with suppress(NotFound, DataCorrupt):
                    manifest = self(name)
                    if backup_id in manifest.stands_for:
                        return manifest
        return None

    def _made_up(self, backup_id: str) -> Manifest:
        found = opennebula.made_up_manifests(self._folder)
        self._read |= {name: one for name, one in found.items() if isinstance(one, Manifest)}
        manifest = found[backup_id]
        if isinstance(manifest, DataCorrupt):
            raise manifest
        return manifest


def read_manifest(stored: StoreFolder, backup_id: str) -> Manifest:
    """The manifest that lies in the folder of that backup."""
    data = stored.read_file(MANIFEST, MAX_SMALL_FILE_BYTES)
    manifest = parse_manifest(data, what=str(stored.path / MANIFEST))
    if manifest.id != backup_id:
        raise DataCorrupt(f"{stored.path}/{MANIFEST} is that of backup {manifest.id}")
    return manifest


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


def read_checked(stored: StoreFolder, file: StoredFile) -> bytes:
    """The content of a small file; `DataCorrupt` unless it is what the manifest says.

    One that was made up may say no more than the size.
    """
    with damage():
        data = stored.read_file(file.name, MAX_SMALL_FILE_BYTES)
    if len(data) != file.size_bytes or (file.blake3 and blake3(data).hexdigest() != file.blake3):
        raise DataCorrupt(f"{stored.path / file.name}: checksum does not match the manifest")
    return data


def open_layer(
    stack: ExitStack, folder: StoreFolder, manifest: Manifest, disk_id: int, *, salvage: bool = False
) -> Layer:
    """A disk's file in one backup, for the data engine; `stack` keeps it open.

    The digests of its clusters are proved here, so that they can prove the rest; a file that has none is
    proved as a whole. The paths lead to the files that were opened, whatever happens to their names.
    With `salvage` one of which nothing can be proved is a lost layer.
    """
    from oned_backup.disk.chain import Layer  # noqa: PLC0415 - loads the data engine

    disk = manifest.disk(disk_id)
    file = manifest.file(disk.file) if disk else None
    if disk is None or file is None:
        raise DataCorrupt(f"backup {manifest.id}: its manifest lacks the file of disk {disk_id}")
    name = f"{manifest.id}/{file.name}"
    foreign = opennebula.is_made_up(manifest)
    try:
        stored = stack.enter_context(folder.folder(manifest.id))
        digests = _proved_digests(stack, stored, manifest, file, salvage=salvage)
        path = _pin(stack, stored, file, any_size=salvage)
    except (DataCorrupt, NotFound) as error:
        if salvage:
            return Layer(None, None, name)
        if error.message.startswith(file.name):  # of which backup is what the daemon wants to know
            raise type(error)(f"{manifest.id}/{error.message}") from error
        raise
    return Layer(path, digests, name, foreign)


def _proved_digests(
    stack: ExitStack, stored: StoreFolder, manifest: Manifest, file: StoredFile, *, salvage: bool
) -> Path | None:
    """The proved digests of a disk's file; None if it has none but is proved as a whole."""
    blocks = manifest.file(file.name + BLOCKS_SUFFIX)
    if blocks is not None:
        try:
            prove_file(stored, blocks)
            return _pin(stack, stored, blocks)
        except DataCorrupt:
            if not salvage:
                raise
    if file.blake3:
        prove_file(stored, file)
    return None


def verify_backup(
    stored: StoreFolder, manifest: Manifest, *, percent: int | None, advance: Advance
) -> VerifiedBackup:
    """What was read of one backup, and every file that is damaged, absent, too short or foreign.

    `percent`: of the clusters of each disk file that has digests; None: everything.
    `advance` is told the bytes that were read since the last time.
    """
    failures: list[tuple[str, str]] = []
    read_bytes = 0

    def count(size: int) -> None:
        nonlocal read_bytes
        read_bytes += size
        advance(size)

    known = {MANIFEST, *(file.name for file in manifest.files)}
    failures += [(name, "not in the manifest") for name in stored.names() if name not in known]
    small = {file.name for file in small_files(manifest)}
    for file in manifest.files:
        if file.name in small and file.size_bytes > MAX_SMALL_FILE_BYTES:  # a restore would refuse it, too
            failures.append(
                (file.name, f"{file.size_bytes} bytes, at most {MAX_SMALL_FILE_BYTES} are accepted")
            )
            continue
        try:
            blocks = manifest.file(file.name + BLOCKS_SUFFIX) if percent is not None else None
            if percent is None or blocks is None or not _is_proved(stored, blocks):
                prove_file(stored, file, count)
            else:
                _prove_sample(stored, file, blocks, percent, count)
        except DataCorrupt as error:
            failures.append((file.name, error.message))
        except OSError as error:
            if error.errno != errno.EIO or not _answers(stored):
                raise
            failures.append((file.name, f"{file.name} cannot be read: {error.strerror}"))
    return VerifiedBackup(manifest.id, read_bytes, tuple(failures))


def _answers(stored: StoreFolder) -> bool:
    """Whether the store itself is well after one file could not be read: then that file is damaged."""
    try:
        descriptor = stored.open_file(MANIFEST)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return bool(file.read(1))
    except (OSError, NotFound, DataCorrupt):
        return False


def prove_file(stored: StoreFolder, file: StoredFile, advance: Advance = lambda _: None) -> None:
    """Read a file of any size; `DataCorrupt` unless it is what the manifest says.

    Where no checksum is known, a qcow2 image must at least be sound.
    """
    if not file.blake3:
        _prove_structure(stored, file)
        return
    with damage():
        descriptor = stored.open_file(file.name)
    with os.fdopen(descriptor, "rb", buffering=0) as stream:
        _check_size(descriptor, file)
        # What is still in the page cache proves nothing about the disk.
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        digest = blake3(max_threads=blake3.AUTO)
        buffer = memoryview(bytearray(min(_READ_BYTES, file.size_bytes + 1)))
        for first, end in ((file.hash_from, file.size_bytes), (0, file.hash_from)):
            position = stream.seek(first)
            while size := stream.readinto(buffer[: end - position]):
                digest.update(buffer[:size])
                advance(size)
                position += size
    if digest.hexdigest() != file.blake3:
        raise DataCorrupt(f"{file.name}: checksum does not match the manifest")


def _prove_structure(stored: StoreFolder, file: StoredFile) -> None:
    from oned_backup.disk.qcow2 import Qcow2File  # noqa: PLC0415 - loads the data engine
    from oned_backup.disk.stored import OpenedFile  # noqa: PLC0415

    with ExitStack() as stack:
        path = _pin(stack, stored, file)
        if not opennebula.is_image(file.name):
            return
        opened = stack.enter_context(closing(OpenedFile(path, None)))
        image = Qcow2File(opened, file.name, foreign=True)
        for _ in image.extents(0, image.guest_bytes):
            pass


def _is_proved(stored: StoreFolder, blocks: StoredFile) -> bool:
    try:
        prove_file(stored, blocks)
    except DataCorrupt:  # named when it is its turn
        return False
    return True


def _prove_sample(
    stored: StoreFolder, file: StoredFile, blocks: StoredFile, percent: int, advance: Advance
) -> None:
    from oned_backup.disk.scrub import verify_blocks  # noqa: PLC0415 - loads the data engine

    with ExitStack() as stack:
        path, digests = _pin(stack, stored, file), _pin(stack, stored, blocks)
        last = 0

        def progress(done: int, _total: int) -> None:
            nonlocal last
            advance(done - last)
            last = done

        failures = verify_blocks(path, digests, percent, progress=progress)
    if failures:
        first = failures[0]
        raise DataCorrupt(
            f"{file.name}: {len(failures)} damaged ranges in the sample, the first at {first.offset}"
        )


def _pin(stack: ExitStack, stored: StoreFolder, file: StoredFile, *, any_size: bool = False) -> Path:
    """A path to this very file, of the right size."""
    with damage():
        descriptor = stored.open_file(file.name)
    stack.callback(os.close, descriptor)
    if not any_size:
        _check_size(descriptor, file)
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def _check_size(descriptor: int, file: StoredFile) -> None:
    size = os.fstat(descriptor).st_size
    if size != file.size_bytes:
        raise DataCorrupt(f"{file.name}: {size} bytes, the manifest says {file.size_bytes}")
