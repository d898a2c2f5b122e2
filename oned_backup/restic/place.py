"""The place that repositories lie in: a directory on a server, or a bucket of S3.

    BASE_PATH/.oned-backup-store    the marker: this is a store, and it is mounted (directories only)
    BASE_PATH/<vm id>/              a restic repository
    BASE_PATH/job_<job id>/         OpenNebula's, of a backup job: with backups of several VMs
    BASE_PATH/.new-<vm id>-<hex>/   one in the making (directories only)

In a directory a repository gets its name when it is complete, by a rename that cannot replace another.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from oned_backup.errors import DriverFailed, NotFound, OnedBackupError, Unavailable
from oned_backup.restic.settings import Settings, bucket
from oned_backup.sdk import Call, sftp
from oned_backup.sdk.folder_store import MARKER, MARKER_TEXT

_REPOSITORY = re.compile(r"(?:job_)?\d{1,9}", re.ASCII)
#: in the names of files that are not complete yet
_TEMPORARY = "-restic-temp-"
_UNKNOWN_KB = 1 << 62


class Place(ABC):
    """What both kinds can do."""

    def repositories(self) -> list[str]:
        """Their names: VMs' ids, and OpenNebula's for jobs."""
        return [name for name in self._names() if _REPOSITORY.fullmatch(name)]

    @abstractmethod
    def _names(self) -> list[str]: ...

    @abstractmethod
    def space_mb(self) -> tuple[int, int, int]:
        """Total, used and free MB."""

    def free_kb(self) -> int:
        """KiB that are free; many if that is not known."""
        return _UNKNOWN_KB

    @abstractmethod
    def require_store(self) -> None:
        """`Unavailable` unless the place is known to be a store; `Misconfigured` without a bucket."""

    @abstractmethod
    def create(self, name: str, init: Callable[[str], object]) -> None:
        """A new repository, made by `init`. Another that was made meanwhile is as good."""

    @contextmanager
    def temporary_files_removed(self, _name: str) -> Iterator[None]:
        """Those that were in a repository before the block are removed after it, if it succeeds.

        A restic that dies, or finds the disk full, leaves them, and no restic removes them. In the block
        the repository must have been locked: then whoever wrote them is gone.
        """
        yield


class BucketPlace(Place):
    """A bucket; it has no end but TOTAL_MB, and no file in it before that is complete."""

    def __init__(self, call: Call, settings: Settings) -> None:
        self._bucket = bucket(call, settings)
        self._total_mb = int(settings.parameters.get("TOTAL_MB", "1048576"))

    def _names(self) -> list[str]:
        return sorted(self._bucket.sizes())

    def space_mb(self) -> tuple[int, int, int]:
        """What the objects take, of TOTAL_MB."""
        used_mb = sum(self._bucket.sizes().values()) >> 20
        return self._total_mb, used_mb, max(self._total_mb - used_mb, 0)

    def require_store(self) -> None:
        """It must be there."""
        self._bucket.require()

    def create(self, name: str, init: Callable[[str], object]) -> None:
        """In a bucket that is there: restic would make one of any name that was mistyped."""
        self._bucket.require()
        init(name)


class DirectoryPlace(Place):
    """A directory on a server that is reached by SFTP."""

    def __init__(self, settings: Settings) -> None:
        self._target, self._base = settings.target, settings.base

    def _names(self) -> list[str]:
        try:
            return sftp.names(self._target, self._base)
        except NotFound as error:
            raise Unavailable(error.message, hint="Create the directory, or mount it.") from error

    def space_mb(self) -> tuple[int, int, int]:
        """Of the file system."""
        try:
            total, used, free = sftp.space_kb(self._target, self._base)
        except NotFound as error:
            raise Unavailable(error.message, hint="Create the directory, or mount it.") from error
        return total >> 10, used >> 10, free >> 10

    def free_kb(self) -> int:
        """Of the file system."""
        try:
            return sftp.space_kb(self._target, self._base)[2]
        except OnedBackupError:
            return _UNKNOWN_KB

    def require_store(self) -> None:
        """It must have the marker."""
        if MARKER not in self._names():
            raise Unavailable(
                f"{self._target}:{self._base} has no {MARKER}, but backups are known to be there",
                hint="Is it mounted?",
            )

    def create(self, name: str, init: Callable[[str], object]) -> None:
        """Beside its name first; from the first one on, the directory is a store."""
        if MARKER not in self._names():
            local = Path("marker")
            local.write_bytes(MARKER_TEXT)
            self._do(f"put {sftp.path_argument(str(local.absolute()))} {self._path(MARKER)}")
        new = f".new-{name}-{os.urandom(4).hex()}"
        init(new)
        try:
            self._do(f"rename {self._path(new)} {self._path(name)}")
        except DriverFailed:
            self._remove(new)
            if name not in self.repositories():
                raise

    @contextmanager
    def temporary_files_removed(self, name: str) -> Iterator[None]:
        """See `Place`."""
        left = sftp.matches(self._target, self._base / name, f"data/*/*{_TEMPORARY}*")
        yield
        if left:
            self._do(*(f"-rm {sftp.path_argument(path)}" for path in left))

    def _remove(self, new: str) -> None:
        """A repository without backups."""
        folders = ["keys", "snapshots", "index", "locks", *(f"data/{n:02x}" for n in range(256)), "data"]
        with suppress(OnedBackupError):
            self._do(
                f"-rm {self._path(new, 'config')}",
                f"-rm {self._path(new, 'keys')}/*",
                *(f"-rmdir {self._path(new, folder)}" for folder in folders),
                f"-rmdir {self._path(new)}",
            )

    def _path(self, *parts: str) -> str:
        return sftp.path_argument(self._base.joinpath(*parts))

    def _do(self, *commands: str) -> None:
        sftp.batch(self._target, commands)


def place_of(call: Call, settings: Settings) -> Place:
    """The place of a datastore."""
    return BucketPlace(call, settings) if settings.s3 else DirectoryPlace(settings)
