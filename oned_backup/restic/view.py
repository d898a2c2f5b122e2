"""A mounted repository as a folder of finished backups, as `sdk.folder_store` wants one.

    <mount>/backup=20261121-023700-1f2e3d/25f4b298/7/backup/disk.0.3 …    ours: tags, restic_snapshot, path
    <mount>/one-53/6968545c/var/lib/one/datastores/0/53/backup/disk.0.3    OpenNebula's

OpenNebula has repositories of backup jobs too, with backups of several VMs.

A backup is finished if its manifest is in it: the files are shown to restic
so that the manifest can only be read when all others were (see `sdk.mounted`), and a
restic_snapshot that lacks something lacks the manifest too.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from oned_backup.errors import DataCorrupt, NotFound
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.sdk.publish import Folder
from oned_backup.sdk.store_folder import StoreFolder

TAG = "backup="
_FOREIGN_TAG = re.compile(r"one-(\d{1,9})", re.ASCII)
#: directories between the top of a restic_snapshot and the files of the backup
_MAX_DEPTH = 16


class StoredBackups(StoreFolder):
    """The finished backups of one VM. `unreadable`: how many restic_snapshots could not be read.

    `path`, for messages, ends with the VM's id. `job`: the name of the repository, if it is one of a job.
    """

    def __init__(self, mount: Path, path: Path, *, job: str = "", unreadable: int = 0) -> None:
        super().__init__(path)
        self._mount = mount
        self._job = job
        self._unreadable = unreadable
        self._finished: dict[str, Path | None] = {}

    def names(self) -> list[str]:
        """The ids of the finished backups."""
        if self._job:
            return self._foreign()
        tags = sorted(entry.name for entry in self._mount.iterdir() if entry.name.startswith(TAG))
        ours = [name for name in (tag.removeprefix(TAG) for tag in tags) if self._place(name) is not None]
        return ours + self._foreign()

    def has(self, name: str) -> bool:
        """Whether there is a finished backup of that id."""
        return self._place(name) is not None

    def folder(self, name: str) -> Folder:
        """Its files; `NotFound`, but `DataCorrupt` if it may be one of those that cannot be read."""
        place = self._place(name)
        if place is None and self._unreadable:
            raise DataCorrupt(
                f"{self.path}: {self._unreadable} restic_snapshots cannot be read; is {name} one?"
            )
        if place is None:
            raise NotFound(f"{self.path}: there is no backup {name}")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
        return Folder(os.open(place, flags), self.path / name)

    def restic_snapshots(self, name: str) -> list[str]:
        """The short ids of all restic_snapshots of that backup, also of those that are not whole."""
        if name in self._foreign():
            return [name.rpartition(".")[2]]
        tagged = self._mount / f"{TAG}{name}"
        return sorted(entry.name for entry in tagged.iterdir()) if tagged.is_dir() else []

    def _foreign(self) -> list[str]:
        """The ids of what OpenNebula stored."""
        if not self._job:
            tags = [entry for entry in self._mount.iterdir() if _FOREIGN_TAG.fullmatch(entry.name)]
            return sorted({short.name for tag in tags for short in tag.iterdir()})
        tag = self._mount / f"one-{self.path.name}"
        return sorted(f"{self._job}.{short.name}" for short in tag.iterdir()) if tag.is_dir() else []

    def _place(self, name: str) -> Path | None:
        """Where the files of a finished backup are; of two with the same id, the older counts."""
        if name not in self._finished and name in self._foreign():
            short = name.rpartition(".")[2]
            self._finished[name] = _files_below(next(self._mount.glob(f"one-*/{short}")))
        elif name not in self._finished:
            tops = [self._mount / f"{TAG}{name}" / short for short in self.restic_snapshots(name)]
            tops.sort(key=lambda top: top.stat().st_mtime_ns)
            places = (_files_below(top) for top in tops)
            self._finished[name] = next((place for place in places if (place / MANIFEST).exists()), None)
        return self._finished[name]


def vms_of_job(mount: Path) -> list[int]:
    """The VMs that have backups in a mounted repository of a job."""
    found = (_FOREIGN_TAG.fullmatch(entry.name) for entry in mount.iterdir())
    return sorted(int(tag[1]) for tag in found if tag)


def _files_below(top: Path) -> Path:
    """The first directory from `top` on that has more than one directory in it."""
    place = top
    for _ in range(_MAX_DEPTH):
        entries = list(place.iterdir())
        if len(entries) != 1 or not entries[0].is_dir() or entries[0].is_symlink():
            break
        place = entries[0]
    return place
