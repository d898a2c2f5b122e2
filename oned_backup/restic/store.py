"""A datastore of restic's: one repository a VM, one restic_snapshot a backup, tagged with its id.

Where the repositories lie is for `place` to say.
"""

from __future__ import annotations

import errno
import json
import selectors
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oned_backup.errors import (
    Busy,
    Cancelled,
    DataCorrupt,
    DriverFailed,
    NoSpace,
    NotFound,
    OnedBackupError,
    Unavailable,
)
from oned_backup.model.manifest import Manifest, parse_manifest
from oned_backup.restic import program
from oned_backup.restic.place import place_of
from oned_backup.restic.program import Repository, Retries, Started
from oned_backup.restic.settings import Settings, repository, settings_of
from oned_backup.restic.view import TAG, StoredBackups, vms_of_job
from oned_backup.sdk import Call
from oned_backup.sdk.folder_store import images_are_known
from oned_backup.sdk.mounted import mounted
from oned_backup.sdk.process import Completed

if TYPE_CHECKING:
    from oned_backup.sdk.files import BackupFile, BackupFiles

_HOST = "oned-backup"
#: less than this on a server that reports "Failure": it is full
_FULL_KB = 64 * 1024
_LOOK_S = 1.0
_SIGN_OF_LIFE_S = 30.0


class AlreadyThere(Exception):
    """A finished backup of that id may be there."""


class _Held:
    """Files of a backup whose manifest cannot be read before `let_go`: until then nothing is finished."""

    def __init__(self, files: BackupFiles, asked: Started | None) -> None:
        self._files = files
        #: is finding out whether there is such a backup already; None: there is none
        self.asked = asked
        self.let_go = threading.Event()
        if asked is None:
            self.let_go.set()

    @property
    def files(self) -> Sequence[BackupFile]:
        return self._files.files

    @property
    def manifest_bytes(self) -> int:
        return self._files.manifest_bytes

    def manifest(self) -> BackupFile:
        self.let_go.wait()
        return self._files.manifest()


class Store:
    """The datastore of a call."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.settings: Settings = settings_of(call)
        self.place = place_of(call, self.settings)
        self._told = time.monotonic()
        for warning in self.settings.confined.warnings:
            call.warn(warning)

    def repository(self, vm_id: int | str) -> Repository:
        """A VM's repository."""
        return repository(self.call, self.settings, str(vm_id))

    def prove_password(self) -> None:
        """`PermissionDenied` if there is a repository, and the password does not open it."""
        for name in self.place.repositories():
            with suppress(NotFound, DataCorrupt):  # the next one may tell
                self.repository(name).must("cat", "config", "--no-lock")
                return

    @contextmanager
    def opened(self, vm_id: int | str, job: str = "") -> Iterator[StoredBackups]:
        """A VM's finished backups, to read, in its own repository or that of a `job`."""
        with self.opened_all(job or str(vm_id), vm_id) as (folder,):
            yield folder

    @contextmanager
    def opened_all(self, name: str, *vm_ids: int | str) -> Iterator[list[StoredBackups]]:
        """The finished backups in a repository, to read: of these VMs, or of all that it has some of.

        `NotFound` if there is no repository, `Unavailable` if the place does not even look like a store.
        What restic says about a read that failed tells damage from a server that is gone.
        """
        repo = self.repository(name)
        job = "" if name.isdecimal() else name
        flags = ["--no-cache"] if self.call.action == "verify" else []
        directory = Path(tempfile.mkdtemp(prefix="repository-", dir=".")).absolute()
        try:
            with repo.mounted(directory, *flags) as started, Retries(self.call.warn).watch(started):
                said = started.so_far().stderr.decode("utf-8", "replace")
                unreadable = said.count("could not load snapshot") + said.count("Ignoring ")
                path = Path(str(self.settings.base / name))
                try:
                    with ExitStack() as stack:
                        yield [
                            stack.enter_context(
                                StoredBackups(
                                    directory,
                                    path / str(vm_id) if job else path,
                                    job=job,
                                    unreadable=unreadable,
                                )
                            )
                            for vm_id in vm_ids or (vms_of_job(directory) if job else [name])
                        ]
                except (DataCorrupt, OSError) as error:
                    raise _read_failure(repo, started, error) from error
        except NotFound as error:
            if "there is no repository" in error.message:
                self.place.require_store()
            raise

    def store(
        self, vm_id: int, backup_id: str, open_files: Callable[[], BackupFiles], *, new: bool
    ) -> Manifest | None:
        """Store the files as a backup; None if a restic_snapshot of that id is there already.

        `new`: none can be there, so restic is not asked for it.
        """
        repo = self.repository(vm_id)
        words = ("snapshots", "--no-lock", "--json", "--tag", TAG + backup_id)
        with nullcontext() if new else repo.start(*words) as asked:
            try:
                with open_files() as files:
                    return self._store(repo, vm_id, backup_id, files, asked)
            except AlreadyThere:
                return None
            except (OnedBackupError, OSError):
                # the exports of a backup that was finished long ago are gone
                if asked is not None and _found(asked.wait()):
                    return None
                raise

    def forget(self, repo: Repository, short_ids: list[str]) -> None:
        """Forget restic_snapshots; what only they needed is freed by a prune."""
        if short_ids:
            repo.must("forget", *short_ids)

    def free_unreferenced(self, name: str) -> None:
        """Remove the packs that a broken backup left, without moving any others."""
        with self.place.temporary_files_removed(name):
            self.repository(name).must("prune", "--max-repack-size", "0")

    def prune(self, name: str) -> None:
        """Free what a repository does not need; a backup that wants to begin waits for that long."""
        with self.place.temporary_files_removed(name):
            self.repository(name).must("prune", *self.settings.prune_flags())

    def create(self, vm_id: int) -> None:
        """Make a VM's repository. Another that was made meanwhile is as good."""
        call, settings = self.call, self.settings
        if images_are_known(call) or (call.request.backup and call.request.backup.parent_id):
            self.place.require_store()
        if call.request.backup and call.request.backup.parent_id:
            raise NotFound(
                f"{settings.location(str(vm_id)).url}: there is no repository, but there were backups"
            )
        self.place.create(str(vm_id), lambda name: self.repository(name).must("init"))

    def _store(
        self, repo: Repository, vm_id: int, backup_id: str, files: BackupFiles, asked: Started | None
    ) -> Manifest:
        top = Path("shown").absolute()
        saved: list[str] = []
        try:
            held = _Held(files, asked)
            with mounted(held, top / str(vm_id) / "backup"):
                try:
                    self._run_backup(repo, vm_id, backup_id, held, saved)
                finally:
                    held.let_go.set()  # restic has ended
            return parse_manifest(b"".join(bytes(chunk) for chunk in files.manifest().chunks()))
        except BaseException as error:
            if not isinstance(error, Cancelled | AlreadyThere):
                with suppress(OnedBackupError):  # backup_cancel will
                    self.forget(repo, saved)
            raise

    def _run_backup(
        self, repo: Repository, vm_id: int, backup_id: str, held: _Held, saved: list[str]
    ) -> None:
        """Until restic has stored everything; `saved` gets the id of what it saved, whole or not."""
        words = ["backup", "--force", "--json", "--host", _HOST]
        words += ["--tag", TAG + backup_id, "--tag", f"vm={vm_id}", f"{vm_id}/backup"]
        created = False
        for _ in repo.awaited():
            while True:
                with repo.start(*words, cwd=Path("shown").absolute()) as storing:
                    self._follow(held, storing)
                    done = storing.wait()
                if not (isinstance(error := repo.error(done), NotFound) and done.returncode) or created:
                    break
                self.create(vm_id)
                created = True
            saved += _summary_ids(done)
            if done.returncode == 0:
                return
            if done.returncode == program.INCOMPLETE and saved:
                raise DriverFailed(f"restic could not read everything: {done.last_words}")
            error = self._explained(error, done.stderr)
            if not isinstance(error, Busy):
                break
        raise error

    def _follow(self, held: _Held, storing: Started) -> None:
        """Until `storing` has ended; `AlreadyThere` as soon as `held.asked` has found something.

        It is ended if it cannot succeed any more: restic itself tries for a quarter of an hour.
        """
        asked, looked, retries = held.asked, 0, Retries(self.call.warn)
        with selectors.DefaultSelector() as selector:
            selector.register(storing, selectors.EVENT_READ)
            if asked is not None:
                selector.register(asked, selectors.EVENT_READ)
            while asked is not None or not storing.ended:
                selector.select(_LOOK_S)
                if asked is not None and (asked.ended or storing.ended):
                    if _found(asked.wait()):
                        raise AlreadyThere
                    selector.unregister(asked)
                    asked = None
                    held.let_go.set()
                storing.stop_if_lost()
                retries.look(storing)
                failures = storing.so_far().stderr.count(b"Failure")
                if failures > looked and not storing.ended:
                    looked = failures
                    if self.place.free_kb() <= _FULL_KB:
                        storing.stop()
                if time.monotonic() - self._told > _SIGN_OF_LIFE_S:
                    self._told = time.monotonic()
                    self.call.log("restic is at work")

    def _explained(self, error: OnedBackupError, stderr: bytes) -> OnedBackupError:
        """SFTP has no word for a full disk: it says "Failure"."""
        if self.settings.s3 or not (isinstance(error, NoSpace) or b"Failure" in stderr):
            return error
        free_kb = self.place.free_kb()
        if free_kb > _FULL_KB and not isinstance(error, NoSpace):
            return error
        return NoSpace(
            f"{self.settings.target}:{self.settings.base}: {free_kb >> 10} MB free", hint="Make room there."
        )


def _found(asked: Completed) -> bool:
    if asked.returncode != 0:
        return False
    try:
        return bool(json.loads(asked.stdout or b"[]"))
    except ValueError as error:
        raise DriverFailed(f"restic snapshots: {error}") from error


def _summary_ids(done: Completed) -> list[str]:
    """The restic_snapshot that `backup --json` has saved."""
    found = []
    for line in done.stdout.splitlines():
        with suppress(ValueError):
            message: Any = json.loads(line)
            if isinstance(message, dict) and message.get("message_type") == "summary":
                found.append(str(message["snapshot_id"]))
    return found


def _read_failure(repo: Repository, started: Started, error: DataCorrupt | OSError) -> BaseException:
    """What restic knows about a read that failed, or the error itself."""
    said = started.so_far()
    known = program.kind_of(said.stderr.decode("utf-8", "replace"))
    if known is Unavailable or started.ended:
        return Unavailable(repo.error(said).message)
    if isinstance(error, OSError) and error.errno == errno.EIO:  # the server answers, so it is what it holds
        why = repo.error(said).message if known is DataCorrupt else "restic cannot read it"
        return DataCorrupt(f"{repo.location.url}: {why}")
    return error
