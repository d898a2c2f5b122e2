"""Sending a backup's files to the server until they are all there.

    prepare ──> rsync --append-verify ──> publish
       ^               │ connection lost
       └─── pause <────┘

An attempt shows the files as a directory (`sdk.mounted`) and has rsync write them in
place, beneath the folder's unfinished name. The next attempt continues: rsync reads
again what the server has, at both ends, and compares checksums before it sends the
rest; so only reading is repeated, which is local, and what was damaged or made of
another source is found. A receiver whose client is gone may live on for a while; it
can only write the same bytes to the same places. Then the server makes all of it
durable and gives it its name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from oned_backup.errors import Cancelled, DriverBug, DriverFailed, NoSpace, OnedBackupError, Unavailable
from oned_backup.model.manifest import FILE_NAME as MANIFEST
from oned_backup.model.manifest import Manifest, parse_manifest
from oned_backup.rsync.failures import LOST_CONNECTION, NotTheLink, explain_rsync
from oned_backup.rsync.server import Prepared, Server, Space
from oned_backup.rsync.stream import Pace, Rest, bytes_per_second
from oned_backup.sdk import failures
from oned_backup.sdk.call import Call
from oned_backup.sdk.files import BackupFiles
from oned_backup.sdk.folder_store import continued_id, partial_name
from oned_backup.sdk.mounted import mounted
from oned_backup.sdk.process import run
from oned_backup.sdk.ssh import wrapper_path

#: a receiver that hears nothing for so long ends, and so do we
_TIMEOUT_S = 60
#: how long to try again without anything new on the server
_PATIENCE_S = 900.0
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
#: what is left of the action's time must be enough to say what went wrong
_LAST_S = 10.0
_LONGEST_S = 14 * 86400.0
_UNPROVED = "failed verification"
_MOST_RESTARTS = 2


class Transfer:
    """A backup on its way. `open_files` gives its files; each attempt reads them anew.

    `without_parent` raises if it is wrong that the server has nothing under the name of the parent.
    """

    def __init__(
        self,
        call: Call,
        server: Server,
        backup_id: str,
        open_files: Callable[[], BackupFiles],
        without_parent: Callable[[], None],
    ) -> None:
        self._call = call
        self._server = server
        self._vm = str(call.vm_id)
        self._backup_id = backup_id
        self._open_files = open_files
        self._without_parent = without_parent
        self._parent_id = continued_id(call)
        self._begun = False
        self._restarts = 0
        self._there_bytes = 0
        self._last_news = time.monotonic()
        self._pause_s = _FIRST_PAUSE_S

    def complete(self) -> Manifest | None:
        """Store and publish the backup; None if it is there already.

        What was sent stays on the server if that cannot be reached any more: the same
        id again goes on from there, and `Server.cancel` removes it.
        """
        while True:
            try:
                return self._attempt()
            except (Cancelled, NotTheLink):
                raise
            except Unavailable as error:
                if not self._begun or self._is_too_late():
                    raise
                self._call.warn(f"{error.message}; the next attempt is in {self._pause_s:g} s")
            except BaseException:
                with suppress(OnedBackupError):
                    self._server.cancel(self._vm, self._backup_id)
                raise
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _attempt(self) -> Manifest | None:
        prepared = self._server.prepare(self._vm, self._backup_id, self._parent_id)
        if prepared.finished:
            return None
        if not prepared.parent:
            self._without_parent()
        if self._begun:
            there_mb = prepared.partial_bytes >> 20
            self._call.warn(f"{self._server.settings.target} answers again and has {there_mb} MB: going on")
        if prepared.partial_bytes > self._there_bytes:
            self._there_bytes, self._last_news = prepared.partial_bytes, time.monotonic()
            self._pause_s = _FIRST_PAUSE_S
        with self._open_files() as files:
            sizes = {file.name: file.size_bytes for file in files.files}
            if any(size >= sizes.get(name, 0) for name, size in prepared.partial.items()):
                prepared = self._anew("holds other files")
            needed = files.total_bytes + files.manifest_bytes
            least = files.least_bytes + files.manifest_bytes
            if least - prepared.partial_bytes > prepared.space.free:
                raise self._no_space(needed, prepared.space)
            try:
                if any(file.head_bytes for file in files.files):
                    manifest, heads = self._stream(files, prepared)
                else:
                    manifest, heads = self._send(files), {}
            except NoSpace as error:
                raise self._no_space(needed, self._server.space()) from error
        self._server.publish(self._vm, self._backup_id, manifest, heads)
        return parse_manifest(manifest)

    def _send(self, files: BackupFiles) -> bytes:
        """The manifest, when everything else is on the server."""
        code, said = 0, ""
        self._begun = True
        try:
            with mounted(files, Path("files").absolute()) as shown:
                done = run(self._argv(shown), timeout_s=self._remaining_s(), check=False)
                code, said = done.returncode, done.stderr.decode("utf-8", "replace")
                if code != 0:
                    raise explain_rsync(self._server.settings.target, code, said)
                for file in files.files:
                    if not file.size_bytes:  # rsync does not read these
                        (shown / file.name).read_bytes()
                return (shown / MANIFEST).read_bytes()
        except OnedBackupError as error:
            # rsync then wants to read a file again, which `mounted` calls a bug; what the
            # source says comes first: its errors, too, make files that are not as announced.
            if _UNPROVED in said and isinstance(error, DriverBug):
                raise self._differs() from error
            if isinstance(error, Unavailable) and code not in LOST_CONNECTION:
                raise NotTheLink(error.message, hint=error.hint) from error
            raise

    def _stream(self, files: BackupFiles, prepared: Prepared) -> tuple[bytes, dict[str, bytes]]:
        """The manifest, and what is still to be put at the beginning of files; everything else is there.

        The size of a compressed image is not known before it is there, which rsync would need.
        """
        pace = Pace(bytes_per_second(self._server.settings.options))
        heads = {}
        for file in files.files:
            there = max(prepared.partial.get(file.name, 0), file.head_bytes)
            rest = Rest(file, there, pace)
            self._begun = True
            digest = self._server.receive(self._vm, self._backup_id, file.name, there, rest)
            rest.require_whole()
            if digest != rest.digest:
                raise self._differs()
            if file.head_bytes:
                heads[file.name] = b"".join(file.head())
        return b"".join(files.manifest().chunks()), heads

    def _differs(self) -> OnedBackupError:
        """Begin anew, but not for ever."""
        self._restarts += 1
        if self._restarts > _MOST_RESTARTS:
            return DriverFailed(f"{self._server.settings.target} has again something else than was sent")
        self._anew("is damaged, or of another source")
        return Unavailable(f"backup {self._backup_id} could not be continued")

    def _anew(self, why: str) -> Prepared:
        """Throw away what the server has of the backup."""
        self._call.warn(
            f"what {self._server.settings.target} has of {self._backup_id} {why}: it is sent anew"
        )
        self._server.cancel(self._vm, self._backup_id)
        return self._server.prepare(self._vm, self._backup_id)

    def _argv(self, shown: Path) -> list[str]:
        settings = self._server.settings
        return [
            *settings.confined.prefix,
            *("rsync", "--recursive", "--times", "--perms", "--chmod=D700,F600", "--append-verify", "-s"),
            *(f"--exclude=/{MANIFEST}", f"--timeout={_TIMEOUT_S}", *settings.options),
            *("-e", str(wrapper_path()), "--", f"{shown}/"),
            settings.remote(f"{self._vm}/{partial_name(self._backup_id)}/"),
        ]

    def _no_space(self, needed: int, space: Space) -> NoSpace:
        where = Path(self._server.settings.remote())
        return failures.no_space(failures.SpaceNeeded(where, needed), space.free)

    def _is_too_late(self) -> bool:
        later = time.monotonic() + self._pause_s
        return later > self._last_news + _PATIENCE_S or self._remaining_s() <= self._pause_s

    def _remaining_s(self) -> float:
        deadline = self._call.deadline
        return _LONGEST_S if deadline is None else max(1.0, deadline - time.time() - _LAST_S)
