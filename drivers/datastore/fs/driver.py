"""Backups as plain files in a directory: a local disk or a mounted network file system.

    BASE_PATH/.oned-backup-store                 the marker: this is a store, and it is mounted
    BASE_PATH/<vm id>/<backup id>/               a finished backup
        vm.xml  domain.xml  disk.0.3  disk.0.3.blocks  …  manifest.json
    BASE_PATH/<vm id>/.partial-<backup id>/      one in the making, or what a killed driver left
    BASE_PATH/<vm id>/.removing-<backup id>/     one that is being deleted

A backup gets its finished name when everything in it is durable, and loses it
before anything in it is deleted. Nothing is locked: names are unique, and the
daemon runs one action at a time for each chain.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from oned_backup.contract.documents import Catalogue, Listing, RestorePlan, VerifiedBackup, VerifyReport
from oned_backup.contract.url import parse_url
from oned_backup.errors import (
    Conflict,
    DataCorrupt,
    InvalidInput,
    Misconfigured,
    NotFound,
    Salvaged,
    Unavailable,
)
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest, dump_manifest
from oned_backup.model.names import checked_name
from oned_backup.sdk import Answer, Call, Driver, restore_points
from oned_backup.sdk.failures import Space
from oned_backup.sdk.publish import Folder
from oned_backup.sdk.stored import Manifests, open_layer, read_checked, small_files, verify_backup

SCHEME = "fs"
MARKER = ".oned-backup-store"
MARKER_TEXT = b"oned-backup store, version 1\n"


class FsDatastore(Driver):
    """All actions; a screen below them, how the store is read."""

    def warm_up(self, action: str) -> None:
        """Load the data engine before it is needed."""
        if action == "backup":
            import oned_backup.disk.image  # noqa: PLC0415
            import oned_backup.sdk.files  # noqa: F401, PLC0415

    def backup(self, call: Call) -> Answer:
        """Store all files under a temporary name, then publish."""
        backup_id, vm = _finished_name(call.backup.id), str(call.vm_id)
        partial = f".partial-{backup_id}"
        with _open_store(call, create=True) as base, base.make_folder(vm, exist_ok=True) as folder:
            if folder.has(backup_id):  # asked again
                folder.sync()
                return _stored(folder, backup_id)
            folder.remove(partial)
            try:
                with call.files() as files, folder.make_folder(partial) as target:
                    call.require_space(call.base_path, files.total_bytes)
                    for file in files:
                        if file.name == MANIFEST:
                            target.publish_file(MANIFEST, b"".join(file.chunks()))
                        else:
                            target.write_file(file.name, file.chunks())
                folder.rename_folder(partial, backup_id)
            except BaseException:
                with suppress(OSError):  # a store that is gone: backup_cancel cleans up
                    _remove_unfinished(base, vm, partial)
                raise
            return _stored(folder, backup_id)

    def backup_cancel(self, call: Call) -> None:
        """Remove what an unfinished backup left."""
        with _open_store(call) as base:
            _remove_unfinished(base, str(call.vm_id), f".partial-{_finished_name(call.backup_id)}")

    def ls(self, call: Call) -> Answer:
        """The disks of a restore point."""
        with _open_vm(call, call.vm_id) as folder:
            backup_id = restore_points.wanted_backup(call)
            disks = restore_points.stored_disks(call, SCHEME, Manifests(folder), backup_id)
        return {"LISTING": Listing(disks).to_xml()}

    def stat(self, call: Call) -> Answer:
        """What the disks of a restore point take once restored."""
        with _open_vm(call, call.vm_id) as folder:
            backup_id = restore_points.wanted_backup(call)
            disks = restore_points.stored_disks(call, SCHEME, Manifests(folder), backup_id)
        return {"SIZE_MB": sum(_megabytes(disk.size_bytes) for disk in disks)}

    def restore(self, call: Call) -> Answer:
        """Disks and documents of a restore point; the documents are checked here."""
        with _open_vm(call, call.vm_id) as folder:
            backup_id = restore_points.wanted_backup(call)
            load = Manifests(folder)
            disks = restore_points.stored_disks(call, SCHEME, load, backup_id)
            manifest = load(backup_id)
            with folder.folder(backup_id) as stored:
                files = tuple((file.name, read_checked(stored, file)) for file in small_files(manifest))
        plan = RestorePlan(backup_id, manifest.increment_id, disks, files)
        return {"PLAN": plan.to_xml()}

    def download(self, call: Call) -> Answer:
        """The disk that URL names, to TARGET or to standard output."""
        from oned_backup.disk.restore import restore_chain  # noqa: PLC0415 - loads the data engine

        url = parse_url(call.option("URL"))
        if url.scheme != SCHEME or url.datastore_id != call.datastore_id:
            raise InvalidInput(f"{url} does not belong to datastore {call.datastore_id}")
        target = call.option("TARGET", "")
        with _open_vm(call, url.vm_id) as folder, ExitStack() as stack:
            chain = restore_points.url_chain(Manifests(folder), url)
            layers = [open_layer(stack, folder, manifest, url.disk_id) for manifest in chain]
            if target:
                call.space = Space(Path(target).parent, sum(layer.path.stat().st_size for layer in layers))
            restored = restore_chain(
                layers,
                Path(target) if target else call.stdout,
                format=call.option("FORMAT", "raw"),
                progress=call.progress,
                salvage=call.option("SALVAGE", "NO").upper() == "YES",
            )
        if restored.salvaged:
            raise _salvaged(call, url.disk_id, restored.salvaged, to_file=bool(target))
        return {"BYTES": restored.bytes_written} if target else {}

    def verify(self, call: Call) -> Answer:
        """Re-read backups, whole or the share PERCENT of their clusters."""
        percent = call.integer_option("PERCENT")
        if percent is not None and not 1 <= percent <= 100:
            raise InvalidInput(f"option PERCENT: {percent} is not between 1 and 100")
        with _open_vm(call, call.vm_id) as folder:
            found = [_verify(call, folder, name, percent) for name in restore_points.meant_backups(call)]
        return {"REPORT": VerifyReport(tuple(found)).to_xml()}

    def rm(self, call: Call) -> None:
        """Remove backups that no other one continues."""
        ids, vm = [_finished_name(name) for name in restore_points.meant_backups(call)], str(call.vm_id)
        with _open_store(call) as base:
            if not base.has(vm):
                return
            with base.folder(vm) as folder:
                _refuse_parents(call, folder, ids)
                for backup_id in reversed(ids):
                    removing = f".removing-{backup_id}"
                    folder.remove(removing)
                    if folder.has(backup_id):
                        folder.rename_folder(backup_id, removing)
                        folder.remove(removing)
            for backup_id in ids:
                _remove_unfinished(base, vm, f".partial-{backup_id}")

    def monitor(self, call: Call) -> Answer:
        """How full the file system is."""
        with _open_store(call) as base:
            found = os.statvfs(base.descriptor)
        unit = found.f_frsize
        return {
            "TOTAL_MB": found.f_blocks * unit >> 20,
            "USED_MB": (found.f_blocks - found.f_bfree) * unit >> 20,
            "FREE_MB": found.f_bavail * unit >> 20,
        }

    def catalogue(self, call: Call) -> Answer:
        """The manifests of all finished backups."""
        manifests, unreadable = [], []
        with _open_store(call) as base:
            for vm in (name for name in base.names() if name.isdecimal()):
                with base.folder(vm) as folder:
                    load = Manifests(folder)
                    for backup_id in _finished(folder):
                        try:
                            manifests.append(_one_line(load(backup_id)))
                        except DataCorrupt as error:
                            unreadable.append((f"{vm}/{backup_id}", error.message))
        return {"CATALOGUE": Catalogue(tuple(manifests), tuple(unreadable)).to_xml()}


DRIVER = FsDatastore()


@contextmanager
def _open_store(call: Call, *, create: bool = False, known: bool = False) -> Iterator[Folder]:
    """The store's root; `Unavailable` if backups are known to be in it but it is not there.

    The directory beneath a file system that is not mounted looks like an empty
    store: without the marker it is none.
    """
    path = call.base_path
    try:
        base = Folder.open(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Unavailable(f"{path} is not there", hint="Create the directory, or mount it.") from error
    with base:
        if base.has(MARKER):
            if base.read_file(MARKER, 1024) != MARKER_TEXT:
                raise Misconfigured(f"{path / MARKER}: not a store of a version that this program knows")
        elif known or _images_known(call):
            raise Unavailable(
                f"{path} has no {MARKER}, but backups are known to be there", hint="Is it mounted?"
            )
        elif create:
            with suppress(Conflict):  # another first backup was quicker
                base.publish_file(MARKER, MARKER_TEXT)
        yield base


@contextmanager
def _open_vm(call: Call, vm_id: int) -> Iterator[Folder]:
    """The folder with a VM's backups, for an action on a backup that is known to exist."""
    with _open_store(call, known=True) as base, base.folder(str(vm_id)) as folder:
        yield folder


def _images_known(call: Call) -> bool:
    datastore = call.request.datastore
    return datastore is not None and bool(datastore.findall("IMAGES/ID"))


def _finished_name(backup_id: str) -> str:
    """`backup_id`, if it can be the name of a finished backup."""
    if checked_name(backup_id, "backup id").startswith("."):
        raise InvalidInput(f"backup id '{backup_id}' begins with a dot")
    return backup_id


def _finished(folder: Folder) -> list[str]:
    return [name for name in folder.names() if not name.startswith(".")]


def _remove_unfinished(base: Folder, vm: str, partial: str) -> None:
    if not base.has(vm):
        return
    with base.folder(vm) as folder:
        folder.remove(partial)
    base.remove_if_empty(vm)


def _stored(folder: Folder, backup_id: str) -> Answer:
    """What `backup` answers, also when it is asked again."""
    manifest = Manifests(folder)(backup_id)
    return {
        "BACKUP_ID": backup_id,
        "SIZE_MB": _megabytes(manifest.size_bytes),
        "FORMAT": "raw",  # OpenNebula's word for everything that is no RBD
        "MANIFEST": _one_line(manifest),
    }


def _one_line(manifest: Manifest) -> str:
    return json.dumps(json.loads(dump_manifest(manifest.raw)), separators=(",", ":"))


def _megabytes(size_bytes: int) -> int:
    return -(-size_bytes >> 20)


def _refuse_parents(call: Call, folder: Folder, ids: list[str]) -> None:
    """Raise `Conflict` if a backup that stays continues one that is to go."""
    load = Manifests(folder)
    for name in _finished(folder):
        if name in ids:
            continue
        try:
            manifest = load(name)
        except DataCorrupt as error:
            call.warn(f"nobody can tell what this backup continues: {error.message}")
            continue
        needed = {manifest.parent_id, *(disk.parent_id for disk in manifest.disks)} & set(ids)
        if needed:
            raise Conflict(
                f"backup {min(needed)} cannot be removed: backup {name} continues it",
                hint="Remove the whole chain, or the newer backups first.",
            )


def _verify(call: Call, folder: Folder, backup_id: str, percent: int | None) -> VerifiedBackup:
    try:
        manifest = Manifests(folder)(backup_id)
    except (DataCorrupt, NotFound) as error:
        return VerifiedBackup(backup_id, 0, ((MANIFEST, error.message),))
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        call.progress(done, manifest.size_bytes)

    with folder.folder(backup_id) as stored:
        return verify_backup(stored, manifest, percent=percent, advance=advance)


def _salvaged(call: Call, disk_id: int, ranges: Sequence[tuple[int, int]], *, to_file: bool) -> Salvaged:
    """The error that lists what had to be zero-filled: on stderr, and where stdout has no data there too."""
    listed = ",".join(f"{offset}+{length}" for offset, length in ranges)
    call.warn(f"disk {disk_id}: zero-filled (offset+length): {listed}")
    lost = sum(length for _, length in ranges)
    error = Salvaged(f"disk {disk_id}: {lost} bytes in {len(ranges)} ranges could not be proved and are zero")
    if to_file:
        error.answer = {"SALVAGED": listed}
    return error
