"""Backups in restic repositories, one a VM, on a server reached by SFTP or in a bucket of S3.

`restic.store` says what lies there; `sdk.folder_store` has the actions that read, by way of
`restic mount`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from oned_backup.contract.documents import Catalogue
from oned_backup.contract.url import parse_url
from oned_backup.errors import Busy, DataCorrupt, InvalidInput, NotFound, Unsupported
from oned_backup.model.manifest import Manifest
from oned_backup.model.names import job_repository
from oned_backup.restic.store import Store
from oned_backup.restic.view import StoredBackups
from oned_backup.sdk import Answer, Call, restore_points
from oned_backup.sdk.folder_store import (
    FolderStore,
    finished_name,
    images_are_known,
    list_manifests,
    merged_files,
    refuse_parents,
    stored_answer,
)
from oned_backup.sdk.stored import Manifests

if TYPE_CHECKING:
    from oned_backup.sdk.files import BackupFiles


class ResticDatastore(FolderStore):
    """All actions; those that read see a mounted repository."""

    scheme = "restic"

    @contextmanager
    def open_vm(self, call: Call, vm_id: int) -> Iterator[StoredBackups]:
        """The finished backups of a VM that the call may mean: those in one repository."""
        with Store(call).opened(vm_id, _job(call)) as folder:
            yield folder

    def backup(self, call: Call) -> Answer:
        """Have restic store the files as they are made."""
        return stored_answer(self._stored(call, call.files, new=call.is_new_id))

    def increment_flatten(self, call: Call) -> Answer:
        """Store the merged backup beside those that it replaces, as a backup is stored."""
        from oned_backup.sdk.flatten import flattened  # noqa: PLC0415 - loads the data engine

        if job := _job(call):
            raise Unsupported(f"{job}: what is in OpenNebula's repository of a job is not merged")
        backup_id = finished_name(call.backup.id)
        with self.open_vm(call, call.vm_id) as folder:
            if folder.has(backup_id):  # asked again
                return flattened(call, Manifests(folder)(backup_id))
            new = not folder.restic_snapshots(backup_id)
            return flattened(call, self._stored(call, lambda: merged_files(call, folder), new=new))

    def backup_cancel(self, call: Call) -> None:
        """Forget what an unfinished backup left, and free it."""
        store, backup_id = Store(call), finished_name(call.backup_id)
        try:
            with store.opened(call.vm_id) as folder:
                if folder.has(backup_id):
                    return
                left = folder.restic_snapshots(backup_id)
        except NotFound:
            return
        store.forget(store.repository(call.vm_id), left)
        store.free_unreferenced(str(call.vm_id))

    def rm(self, call: Call) -> None:
        """Forget backups that no other one continues; a later prune frees their space."""
        store, ids = Store(call), [finished_name(name) for name in restore_points.meant_backups(call)]
        job = _job(call)
        try:
            with store.opened(call.vm_id, job) as folder:
                refuse_parents(call, folder, ids)
                left = [short for backup_id in ids for short in folder.restic_snapshots(backup_id)]
        except NotFound:
            return
        store.forget(store.repository(job or call.vm_id), left)

    def monitor(self, call: Call) -> Answer:
        """How full the server's file system is; at first also whether the password opens what is there."""
        store = Store(call)
        if not images_are_known(call):
            store.prove_password()
        total, used, free = store.place.space_mb()
        return {"TOTAL_MB": total, "USED_MB": used, "FREE_MB": free}

    def catalogue(self, call: Call) -> Answer:
        """The manifests of all finished backups."""
        store = Store(call)
        manifests: list[str] = []
        unreadable: list[tuple[str, str]] = []
        for name in store.place.repositories():
            try:
                with store.opened_all(name) as folders:
                    for folder in folders:
                        list_manifests(folder, name, manifests, unreadable)
            except DataCorrupt as error:
                unreadable.append((name, error.message))
        return {"CATALOGUE": Catalogue(tuple(manifests), tuple(unreadable)).to_xml()}

    def prune(self, call: Call) -> Answer:
        """Free what no backup needs, in each repository; one that is in use has its turn next time."""
        store = Store(call)
        before = store.place.space_mb()[1]
        for name in store.place.repositories():
            try:
                store.prune(name)
            except Busy as error:
                call.warn(f"repository {name} is left for the next time: {error.message}")
            except NotFound:
                continue
        return {"FREED_MB": max(before - store.place.space_mb()[1], 0)}

    def _stored(self, call: Call, open_files: Callable[[], BackupFiles], *, new: bool) -> Manifest:
        """The manifest of the call's backup, which is stored unless it is there already."""
        store, backup_id = Store(call), finished_name(call.backup.id)
        manifest = store.store(call.vm_id, backup_id, open_files, new=new)
        if manifest is None:
            manifest = self._asked_again(call, store, backup_id, open_files)
        return manifest

    def _asked_again(
        self, call: Call, store: Store, backup_id: str, open_files: Callable[[], BackupFiles]
    ) -> Manifest:
        """The manifest of what is there; if it is not whole it is forgotten and made anew."""
        with store.opened(call.vm_id) as folder:
            if folder.has(backup_id):
                return Manifests(folder)(backup_id)
            left = folder.restic_snapshots(backup_id)
        store.forget(store.repository(call.vm_id), left)
        manifest = store.store(call.vm_id, backup_id, open_files, new=False)
        if manifest is None:
            raise NotFound(f"backup {backup_id} comes and goes")
        return manifest


def _job(call: Call) -> str:
    """OpenNebula's repository of a job, if the backups that the call means lie in one."""
    if call.action == "download":
        ids = [backup_id for _, backup_id in parse_url(call.option("URL")).chain]
    else:
        ids = list(restore_points.meant_backups(call))
    jobs = {job_repository(backup_id) for backup_id in ids}
    if len(jobs) > 1:
        raise InvalidInput(f"backups in several repositories: {', '.join(ids)}")
    return next(iter(jobs), "")


DRIVER = ResticDatastore()
