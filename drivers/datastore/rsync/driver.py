"""Backups on a server: written by rsync, read through sshfs, both over SSH.

`sdk.folder_store` says what lies there and has the actions that read;
`oned_backup.rsync` has what it takes to write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from oned_backup.errors import NotFound
from oned_backup.model.manifest import Manifest
from oned_backup.rsync.arguments import settings_from
from oned_backup.rsync.server import Server
from oned_backup.sdk import Answer, Call, Level, restore_points
from oned_backup.sdk.folder_store import (
    FolderStore,
    finished_name,
    images_are_known,
    is_store,
    known_store_id,
    merged_files,
    refuse_parents,
    require_parent,
    stored_answer,
)
from oned_backup.sdk.publish import Folder
from oned_backup.sdk.sshfs import shown
from oned_backup.sdk.stored import Manifests

if TYPE_CHECKING:
    from oned_backup.sdk.files import BackupFiles


class RsyncDatastore(FolderStore):
    """The actions that write, by a script on the server; reading needs no more than sftp."""

    scheme = "rsync"

    def warm_up(self, action: str) -> None:
        """Load what sending takes, too."""
        super().warm_up(action)
        if action == "backup":
            import oned_backup.rsync.transfer  # noqa: F401, PLC0415

    @contextmanager
    def open_base(self, call: Call) -> Iterator[Folder]:
        """BASE_PATH on the server, mounted read-only in the driver's private directory."""
        settings = settings_from(call.parameters, call.base_path)
        name = Path(f"{settings.target}:{settings.base}")
        with shown(settings.remote(), Path("store").absolute(), name) as base:
            yield base

    def backup(self, call: Call) -> Answer:
        """Send all files under a temporary name, then publish."""
        server = _server(call)
        manifest = _send(call, server, call.files, lambda: self._require_parent(call))
        if manifest is None:  # asked again
            with self.open_vm(call, call.vm_id) as folder:
                manifest = Manifests(folder)(call.backup.id)
        return stored_answer(manifest, server.store_id)

    def _require_parent(self, call: Call) -> None:
        with self.open_vm(call, call.vm_id) as folder:
            require_parent(call, folder)

    def increment_flatten(self, call: Call) -> Answer:
        """Send the merged backup, as a backup is sent, beside those that it replaces."""
        from oned_backup.sdk.flatten import flattened  # noqa: PLC0415 - loads the data engine

        with self.open_vm(call, call.vm_id) as folder:
            manifest = _send(call, _server(call), lambda: merged_files(call, folder))
            return flattened(call, manifest or Manifests(folder)(call.backup.id))

    def backup_cancel(self, call: Call) -> None:
        """Remove what an unfinished backup left."""
        _server(call).cancel(str(call.vm_id), finished_name(call.backup_id))

    def rm(self, call: Call) -> None:
        """Remove backups that no other one continues."""
        ids, vm = [finished_name(name) for name in restore_points.meant_backups(call)], str(call.vm_id)
        with self.open_base(call) as base:
            is_store(call, base)
            try:
                with base.folder(vm) as folder:
                    refuse_parents(call, folder, ids)
            except NotFound:
                return
        _server(call).remove(vm, ids[::-1])

    def monitor(self, call: Call) -> Answer:
        """How full the server's file system is."""
        space = _server(call).space()
        return {"TOTAL_MB": space.total >> 20, "USED_MB": space.used >> 20, "FREE_MB": space.free >> 20}


DRIVER = RsyncDatastore()


def _server(call: Call) -> Server:
    settings = settings_from(call.parameters, call.base_path)
    for warning in settings.confined.warnings:
        call.warn(warning)
    return Server(
        settings,
        known=known_store_id(call) or ("1" if images_are_known(call) else "0"),
        alive=lambda: call.log(f"{settings.target} is at work", Level.DEBUG),
    )


def _send(
    call: Call,
    server: Server,
    open_files: Callable[[], BackupFiles],
    without_parent: Callable[[], None] = lambda: None,
) -> Manifest | None:
    from oned_backup.rsync.transfer import Transfer  # noqa: PLC0415 - loads the data engine

    return Transfer(call, server, finished_name(call.backup.id), open_files, without_parent).complete()
