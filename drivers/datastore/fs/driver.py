"""Backups as plain files in a directory: a local disk or a mounted network file system.

`sdk.folder_store` says what lies there and has the actions that read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from oned_backup.errors import Unavailable
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest
from oned_backup.sdk import Answer, Call, restore_points
from oned_backup.sdk.folder_store import (
    MARKER,
    FolderStore,
    finished_name,
    is_store,
    merged_files,
    new_marker,
    partial_name,
    refuse_parents,
    removing_name,
    require_parent,
    store_id,
    stored_answer,
)
from oned_backup.sdk.publish import Folder
from oned_backup.sdk.stored import Manifests

if TYPE_CHECKING:
    from oned_backup.sdk.files import BackupFiles


class FsDatastore(FolderStore):
    """The actions that write; a directory can be read as it is."""

    scheme = "fs"

    @contextmanager
    def open_base(self, call: Call) -> Iterator[Folder]:
        """BASE_PATH itself."""
        path = call.base_path
        try:
            base = Folder.open(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Unavailable(f"{path} is not there", hint="Create the directory, or mount it.") from error
        with base:
            yield base

    def backup(self, call: Call) -> Answer:
        """Store all files under a temporary name, then publish."""
        vm = str(call.vm_id)
        with self.open_base(call) as base:
            if not is_store(call, base):
                base.publish_file(MARKER, new_marker(call), replace=True)
            with base.make_folder(vm, exist_ok=True) as folder:
                if not folder.has(finished_name(call.backup.id)):
                    require_parent(call, folder)
                return stored_answer(_published(call, base, folder, call.files), store_id(base))

    def increment_flatten(self, call: Call) -> Answer:
        """Store the merged backup beside those that it replaces, as a backup is stored."""
        from oned_backup.sdk.flatten import flattened  # noqa: PLC0415 - loads the data engine

        with self.open_base(call) as base:
            is_store(call, base, known=True)
            with base.folder(str(call.vm_id)) as folder:
                return flattened(call, _published(call, base, folder, lambda: merged_files(call, folder)))

    def backup_cancel(self, call: Call) -> None:
        """Remove what an unfinished backup left."""
        with self.open_base(call) as base:
            is_store(call, base)
            _remove_unfinished(base, str(call.vm_id), call.backup_id)

    def rm(self, call: Call) -> None:
        """Remove backups that no other one continues."""
        ids, vm = [finished_name(name) for name in restore_points.meant_backups(call)], str(call.vm_id)
        with self.open_base(call) as base:
            is_store(call, base)
            if not base.has(vm):
                return
            with base.folder(vm) as folder:
                refuse_parents(call, folder, ids)
                for backup_id in reversed(ids):
                    removing = removing_name(backup_id)
                    folder.remove(removing)
                    if folder.has(backup_id):
                        folder.rename_folder(backup_id, removing)
                        folder.remove(removing)
            for backup_id in ids:
                _remove_unfinished(base, vm, backup_id)

    def monitor(self, call: Call) -> Answer:
        """How full the file system is."""
        with self.open_base(call) as base:
            is_store(call, base)
            found = os.statvfs(base.descriptor)
        unit = found.f_frsize
        return {
            "TOTAL_MB": found.f_blocks * unit >> 20,
            "USED_MB": (found.f_blocks - found.f_bfree) * unit >> 20,
            "FREE_MB": found.f_bavail * unit >> 20,
        }


DRIVER = FsDatastore()


def _published(call: Call, base: Folder, folder: Folder, open_files: Callable[[], BackupFiles]) -> Manifest:
    """The manifest of the call's backup, which is stored unless it is there already."""
    backup_id = finished_name(call.backup.id)
    partial = partial_name(backup_id)
    if folder.has(backup_id):  # asked again
        folder.sync()
        return Manifests(folder)(backup_id)
    folder.remove(partial)
    try:
        with open_files() as files, folder.make_folder(partial) as target:
            call.require_space(call.base_path, files.total_bytes, files.least_bytes)
            for file in files:
                if file.name == MANIFEST:
                    target.publish_file(MANIFEST, b"".join(file.chunks()))
                else:
                    target.write_file(file.name, file.chunks(), begin=file.head_bytes, head=file.head)
        folder.rename_folder(partial, backup_id)
    except BaseException:
        with suppress(OSError):  # a store that is gone: backup_cancel cleans up
            _remove_unfinished(base, str(call.vm_id), backup_id)
        raise
    return Manifests(folder)(backup_id)


def _remove_unfinished(base: Folder, vm: str, backup_id: str) -> None:
    partial = partial_name(backup_id)
    if not base.has(vm):
        return
    with base.folder(vm) as folder:
        folder.remove(partial)
    base.remove_if_empty(vm)
