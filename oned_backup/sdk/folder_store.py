"""Stores whose backups are folders of plain files, wherever these lie: what their drivers share.

    BASE_PATH/.oned-backup-store                 the marker: this is a store, and it is mounted
    BASE_PATH/<vm id>/<backup id>/               a finished backup
        vm.xml  domain.xml  disk.0.3  disk.0.3.blocks  …  manifest.json
    BASE_PATH/<vm id>/.partial-<backup id>/      one in the making, or what a killed driver left
    BASE_PATH/<vm id>/.removing-<backup id>/     one that is being deleted

A backup gets its finished name when everything in it is durable, and loses it
before anything in it is deleted. Nothing is locked: names are unique, and the
daemon runs one action at a time for each chain. The marker's second line tells this store from
any other one that might be mounted in its place; the daemon keeps it with the datastore.

`FolderStore` has the actions that read, for a driver that can show the store as
a directory. Those that write are the driver's own.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, ClassVar

from oned_backup.contract.companions import VM_XML
from oned_backup.contract.documents import Catalogue, Listing, RestorePlan, VerifiedBackup, VerifyReport
from oned_backup.errors import (
    DataCorrupt,
    InvalidInput,
    Misconfigured,
    NotFound,
    Unavailable,
)
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest, StoredFile, dump_on_one_line
from oned_backup.model.names import checked_name
from oned_backup.sdk import restore_points
from oned_backup.sdk.call import Answer, Call
from oned_backup.sdk.download import salvages, wanted_disk, write_disk
from oned_backup.sdk.entry import Driver
from oned_backup.sdk.opennebula import is_made_up, plain_vm_xml
from oned_backup.sdk.store_folder import StoreFolder
from oned_backup.sdk.stored import Manifests, open_layer, read_checked, small_files, verify_backup

if TYPE_CHECKING:
    from oned_backup.disk.chain import Layer
    from oned_backup.sdk.flatten import MergedFiles

MARKER = ".oned-backup-store"
MARKER_TEXT = b"oned-backup store, version 1\n"
_ID = re.compile(rb"(?:[0-9a-f]{32}\n)?")


class FolderStore(Driver):
    """The actions that read. `scheme`: of the driver's pseudo-URLs."""

    scheme: ClassVar[str]

    def open_base(self, call: Call) -> AbstractContextManager[StoreFolder]:
        """BASE_PATH as a directory to read; `Unavailable` if it is not to be had."""
        raise NotImplementedError

    def warm_up(self, action: str) -> None:
        """Load the data engine before it is needed."""
        if action == "backup":
            import oned_backup.disk.image  # noqa: PLC0415
            import oned_backup.sdk.files  # noqa: F401, PLC0415

    def ls(self, call: Call) -> Answer:
        """The disks of a restore point."""
        with self.open_vm(call, call.vm_id) as folder:
            backup_id = restore_points.wanted_backup(call)
            disks = restore_points.stored_disks(call, self.scheme, manifests_in(call, folder), backup_id)
        return {"LISTING": Listing(disks).to_xml()}

    def stat(self, call: Call) -> Answer:
        """What the disks of a restore point take once restored."""
        with self.open_vm(call, call.vm_id) as folder:
            backup_id = restore_points.wanted_backup(call)
            disks = restore_points.stored_disks(call, self.scheme, manifests_in(call, folder), backup_id)
        return {"SIZE_MB": sum(-(-disk.size_bytes >> 20) for disk in disks)}

    def restore(self, call: Call) -> Answer:
        """Disks and documents of a restore point; the documents are checked here."""
        with self.open_vm(call, call.vm_id) as folder:
            backup_id = restore_points.wanted_backup(call)
            load = manifests_in(call, folder)
            disks = restore_points.stored_disks(call, self.scheme, load, backup_id)
            manifest = load(backup_id)
            with folder.folder(backup_id) as stored:
                files = list(_documents(call, stored, manifest))
        if is_made_up(manifest):
            files = [(name, plain_vm_xml(data) if name == VM_XML else data) for name, data in files]
        plan = RestorePlan(backup_id, manifest.increment_id, disks, tuple(files))
        return {"PLAN": plan.to_xml()}

    def download(self, call: Call) -> Answer:
        """The disk that URL names, to TARGET or to standard output."""
        url = wanted_disk(call, self.scheme)
        with self.open_vm(call, url.vm_id) as folder, ExitStack() as stack:
            chain = restore_points.url_chain(manifests_in(call, folder), url)
            _say_what_is_unproved(call, chain)
            layers = [
                open_layer(stack, folder, manifest, url.disk_id, salvage=salvages(call)) for manifest in chain
            ]
            return write_disk(call, url, layers)

    def verify(self, call: Call) -> Answer:
        """Re-read backups, whole or the share PERCENT of their clusters."""
        percent = call.integer_option("PERCENT")
        if percent is not None and not 1 <= percent <= 100:
            raise InvalidInput(f"option PERCENT: {percent} is not between 1 and 100")
        meant = restore_points.meant_backups(call)
        try:
            with self.open_vm(call, call.vm_id) as folder:
                found = [_verify(call, folder, name, percent) for name in meant]
        except NotFound as error:  # the store is there, but nothing of the VM is
            found = [VerifiedBackup(name, 0, ((MANIFEST, error.message),)) for name in meant]
        return {"REPORT": VerifyReport(tuple(found)).to_xml()}

    def catalogue(self, call: Call) -> Answer:
        """The manifests of all finished backups."""
        manifests: list[str] = []
        unreadable: list[tuple[str, str]] = []
        with self.open_base(call) as base:
            is_store(call, base)
            for vm in vm_names(base):
                try:
                    with base.folder(vm) as folder:
                        list_manifests(folder, vm, manifests, unreadable)
                except DataCorrupt as error:
                    unreadable.append((vm, error.message))
            store = store_id(base)
        found = Catalogue(tuple(manifests), tuple(unreadable)).to_xml()
        return {"CATALOGUE": found, **({"STORE_ID": store} if store else {})}

    @contextmanager
    def open_vm(self, call: Call, vm_id: int) -> Iterator[StoreFolder]:
        """The folder with a VM's backups, for an action on a backup that is known to exist."""
        with self.open_base(call) as base:
            is_store(call, base, known=True)
            with base.folder(str(vm_id)) as folder:
                yield folder


def is_store(call: Call, base: StoreFolder, *, known: bool = False) -> bool:
    """False for a place where no store was begun yet; `Unavailable` if backups are `known` to be there.

    The directory beneath a file system that is not mounted looks like an empty
    store: without the marker it is none. Backups that are there prove it too:
    OpenNebula's stores have no marker. `Unavailable`, too, if it is another store than it was.
    """
    marked = base.read_file(MARKER, 1024) if base.has(MARKER) else b""  # as an empty one is: of who died
    if marked:
        if not marked.startswith(MARKER_TEXT) or not _ID.fullmatch(marked[len(MARKER_TEXT) :]):
            raise Misconfigured(f"{base.path / MARKER}: not a store of a version that this program knows")
        expected, found = known_store_id(call), _id_in(marked)
        if expected and found != expected:
            raise Unavailable(
                f"{base.path / MARKER}: this is store {found or 'without id'}, not {expected}",
                hint="Is another disk mounted there? Mount the right one.",
            )
        return True
    if not known and not images_are_known(call):
        return False
    for vm in vm_names(base):
        with suppress(DataCorrupt), base.folder(vm) as folder:
            if finished_names(folder):
                return False
    raise Unavailable(
        f"{base.path} has no {MARKER}, but backups are known to be there", hint="Is it mounted?"
    )


def new_marker(call: Call) -> bytes:
    """The marker of a new store, or of one that has lost it."""
    return MARKER_TEXT + (known_store_id(call) or secrets.token_hex(16)).encode() + b"\n"


def store_id(base: StoreFolder) -> str:
    """What tells the store from others; empty if it has no such thing."""
    return _id_in(base.read_file(MARKER, 1024)) if base.has(MARKER) else ""


def _id_in(marker: bytes) -> str:
    return marker[len(MARKER_TEXT) :].decode("ascii", "replace").strip()


def known_store_id(call: Call) -> str:
    """The id of the store in which the daemon's catalogue has backups; empty if it knows none."""
    datastore = call.request.datastore
    if datastore is None or not images_are_known(call):
        return ""
    return datastore.findtext("STORE_ID", "")


def images_are_known(call: Call) -> bool:
    """Whether the daemon's catalogue has backups in this store."""
    datastore = call.request.datastore
    return datastore is not None and bool(datastore.findall("IMAGES/ID"))


def finished_name(backup_id: str) -> str:
    """`backup_id`, if it can be the name of a finished backup."""
    if checked_name(backup_id, "backup id").startswith("."):
        raise InvalidInput(f"backup id '{backup_id}' begins with a dot")
    return backup_id


def partial_name(backup_id: str) -> str:
    """The name of the folder in which the backup is made."""
    return f".partial-{finished_name(backup_id)}"


def removing_name(backup_id: str) -> str:
    """The name of the folder in which the backup is deleted."""
    return f".removing-{finished_name(backup_id)}"


def finished_names(folder: StoreFolder) -> list[str]:
    """The ids of the finished backups of a VM."""
    return [name for name in folder.names() if not name.startswith(".")]


def manifests_in(call: Call, folder: StoreFolder) -> Manifests:
    """The manifests of a VM's backups, with what the daemon's catalogue has for those that are lost."""
    catalogue = call.request.catalogue
    return Manifests(folder, () if catalogue is None else catalogue.manifests, call.warn)


def list_manifests(
    folder: StoreFolder, where: str, manifests: list[str], unreadable: list[tuple[str, str]]
) -> None:
    """Add the manifests of the finished backups of a VM, and what is wrong with those that cannot be read."""
    load = Manifests(folder)
    for backup_id in finished_names(folder):
        try:
            manifest = load(backup_id)
            if str(manifest.vm_id) != folder.path.name:
                raise DataCorrupt(f"{folder.path / backup_id} is of VM {manifest.vm_id}")
            manifests.append(dump_on_one_line(manifest.raw))
        except DataCorrupt as error:
            unreadable.append((f"{where}/{backup_id}", error.message))


def vm_names(base: StoreFolder) -> list[str]:
    """The folders of the VMs that have backups in the store."""
    return [name for name in base.names() if name.isdecimal() and name.isascii()]


def stored_answer(manifest: Manifest, store: str = "") -> Answer:
    """What `backup` answers, also when it is asked again; `store` is the store's id, if it has one."""
    return {
        "BACKUP_ID": manifest.id,
        "SIZE_MB": manifest.size_mb,
        "FORMAT": "raw",  # OpenNebula's word for everything that is no RBD
        "MANIFEST": dump_on_one_line(manifest.raw),
        **({"STORE_ID": store} if store else {}),
    }


def refuse_parents(call: Call, folder: StoreFolder, ids: Sequence[str]) -> None:
    """Raise `Conflict` if a backup in `folder` that stays continues one of `ids`."""
    load = Manifests(folder)
    found = []
    for name in finished_names(folder):
        try:
            found.append(load(name))
        except DataCorrupt as error:
            if name not in ids:
                call.warn(f"nobody can tell what this backup continues: {error.message}")
    restore_points.refuse_parents(found, ids)


def continued_id(call: Call) -> str:
    """The backup that the one at hand continues; empty if it stands alone."""
    exports = call.request.exports
    return call.backup.parent_id if exports is not None and exports.type is BackupType.INCREMENT else ""


def require_parent(call: Call, folder: StoreFolder) -> None:
    """`NotFound` if the backup at hand continues one that is not in the store: nobody could restore it.

    That happens to a store that was brought back from an older copy, or that is another one.
    """
    parent_id = continued_id(call)
    if parent_id and _lost([parent_id], folder, Manifests(folder)):
        raise NotFound(f"{folder.path / parent_id} is absent: backup {call.backup.id} cannot continue it")


def merged_files(call: Call, folder: StoreFolder) -> MergedFiles:
    """The files of the merged backup that `increment_flatten` is to make of some in `folder`."""
    from oned_backup.sdk.flatten import MergedFiles  # noqa: PLC0415 - loads the data engine

    def layer(stack: ExitStack, manifest: Manifest, disk_id: int) -> Layer:
        return open_layer(stack, folder, manifest, disk_id)

    def small(manifest: Manifest, file: StoredFile) -> bytes:
        with folder.folder(manifest.id) as stored:
            return read_checked(stored, file)

    return MergedFiles(call, manifests_in(call, folder), layer, small)


def _documents(call: Call, stored: StoreFolder, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """The small files of a backup; with SALVAGE without those that are damaged."""
    for file in small_files(manifest):
        try:
            yield file.name, read_checked(stored, file)
        except DataCorrupt as error:
            if not salvages(call):
                raise
            call.warn(f"{file.name} is left out: {error.message}")


def _say_what_is_unproved(call: Call, manifests: Iterable[Manifest]) -> None:
    foreign = [manifest.id for manifest in manifests if is_made_up(manifest)]
    if foreign:
        call.warn(
            f"{', '.join(foreign)}: stored by OpenNebula, without checksums: only their form was checked"
        )


def _verify(call: Call, folder: StoreFolder, backup_id: str, percent: int | None) -> VerifiedBackup:
    load = manifests_in(call, folder)
    try:
        manifest = load(backup_id)
    except (DataCorrupt, NotFound) as error:
        return VerifiedBackup(backup_id, 0, ((MANIFEST, error.message),))
    _say_what_is_unproved(call, [manifest])
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        call.progress(done, manifest.size_bytes)

    with folder.folder(backup_id) as stored:
        found = verify_backup(stored, manifest, percent=percent, advance=advance)
    lost = load.lost.get(backup_id)
    parents = sorted({disk.parent_id for disk in manifest.disks if disk.parent_id})
    gaps = [(MANIFEST, f"continues {name}, which is absent") for name in _lost(parents, folder, load)]
    return VerifiedBackup(
        backup_id, found.read_bytes, (*([(MANIFEST, lost)] if lost else ()), *found.failures, *gaps)
    )


def _lost(parents: Iterable[str], folder: StoreFolder, load: Manifests) -> list[str]:
    """Those of `parents` that are absent, and that no other backup stands for."""
    return [name for name in parents if not folder.has(name) and load.standing_for(name) is None]
