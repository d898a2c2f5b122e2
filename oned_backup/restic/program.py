"""restic, the program, around one repository: its command line, what its ends mean, its locks, its mount.

Every call of restic derives the key anew, which takes most of a second: one call
a backup is the aim. From 0.17 on exit codes tell what happened; older ones (Debian
12 has 0.14) end with 1 for everything, and the exact text of the message decides.
Neither the password nor other keys are ever in an argument or in the environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from oned_backup.errors import (
    Busy,
    DataCorrupt,
    DriverFailed,
    Misconfigured,
    NoSpace,
    NotFound,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
)
from oned_backup.restic.s3 import KEYS, UNPROVED
from oned_backup.sdk import fuse, ssh
from oned_backup.sdk.process import Completed

#: of `backup`: a restic_snapshot was saved, but without something that could not be read
INCOMPLETE = 3
#: of all commands, from 0.17 on
_CODES: Mapping[int, type[OnedBackupError]] = {10: NotFound, 11: Busy, 12: PermissionDenied}
_KEPT_BYTES = 1 << 26
_GRACE_S = 5.0
#: how long somebody else's lock is waited for
_LOCK_WAIT_S = 60.0
_LOCK_PAUSE_S = 2.0
_MOUNT_S = 120.0
_SIGN_OF_LIFE_S = 30.0
_LOOK_S = 1.0
_TRIES_AGAIN = b"retrying after"
_LOST = (b"connection lost", b"ssh command exited")

#: the first that is found counts: what is wrong with us or the way there comes before damage
_SAYINGS: tuple[tuple[str, type[OnedBackupError]], ...] = (
    (r"wrong password or no key found", PermissionDenied),
    (r"repository is already locked", Busy),
    (r"unable to open config file: .*(?:does not exist|no such file or directory)", NotFound),
    (r"\bx509: ", Misconfigured),
    (r"specified bucket does not exist|NoSuchBucket", Misconfigured),
    (r"Access ?Denied|SignatureDoesNotMatch|InvalidAccessKeyId|signature we calculated", PermissionDenied),
    (r"Access Key Id you provided does not exist|[Pp]ermission denied", PermissionDenied),
    (r"[Nn]o space left on device|QuotaExceeded|XMinioStorageFull", NoSpace),
    (r"unable to start the sftp session|ssh command exited|connection lost|broken pipe", Unavailable),
    (r"dial tcp|connection refused|connection reset|no such host|i/o timeout", Unavailable),
    (r"ciphertext verification failed|invalid data returned|hash does not match|decrypt", DataCorrupt),
    (r"(?:blob|pack|index|tree).*(?:not found|does not exist)|not found in .*index", DataCorrupt),
    (r"unexpected EOF|truncated|wrong data|file does not exist|invalid", DataCorrupt),
)


#: what restic says when it may not have waited for the words of an ssh that has ended
_UNHEARD = re.compile(r"unable to start the sftp session|file already closed")
#: how ssh begins to say that a host has another key; of its words only these may have been heard
_BANNER = "@@@@"


@dataclass(frozen=True)
class Location:
    """Where a repository is. `target`: the `user@host` that ssh connects to, empty for S3."""

    url: str
    target: str = ""
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Started:
    """A running program whose output goes to files. Use it as a context manager: it ends with that."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], cwd: Path | None) -> None:
        self._argv = tuple(argv)
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, cwd=cwd, env=environment
            )
        except FileNotFoundError as error:
            raise Misconfigured("restic is not installed", hint="Install the package restic.") from error
        self._pidfd = os.pidfd_open(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        os.close(self._pidfd)
        self._out.close()
        self._err.close()

    def fileno(self) -> int:
        """Becomes readable when it has ended."""
        return self._pidfd

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self._process.poll() is not None

    def wait(self, alive: Callable[[], None] = lambda: None) -> Completed:
        """Its end; `alive` is called now and then meanwhile. It is ended when its connection is lost."""
        told = time.monotonic()
        while True:
            try:
                self._process.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                self.stop_if_lost()
                if time.monotonic() - told > _SIGN_OF_LIFE_S:
                    told = time.monotonic()
                    alive()
            else:
                return self.so_far()

    def stop_if_lost(self) -> None:
        """End it if its ssh is gone: it would try for a quarter of an hour, and cannot succeed."""
        if not self.ended and any(word in _content(self._err) for word in _LOST):
            self.stop()

    def so_far(self) -> Completed:
        """What it printed up to now."""
        return Completed(self._argv, self._process.poll() or 0, _content(self._out), _content(self._err))

    def stop(self) -> None:
        """End it; it has its time to remove its lock, which 0.14 does for SIGINT alone."""
        if self.ended:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Retries:
    """Tells `say` when restic has begun to try something again: it does so for long, and in silence."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._seen = 0

    def look(self, started: Started) -> None:
        """Read what it has printed since the last time."""
        lines = [line for line in started.so_far().stderr.splitlines() if _TRIES_AGAIN in line]
        if len(lines) > self._seen:
            self._seen = len(lines)
            self._say(f"restic tries again: {lines[-1].decode('utf-8', 'replace').strip()[:400]}")

    @contextlib.contextmanager
    def watch(self, started: Started) -> Iterator[None]:
        """Look again and again during the block; what has lost its connection is ended."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(_LOOK_S):
                self.look(started)
                started.stop_if_lost()

        watcher = threading.Thread(target=look, name="restic-retries", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            self.look(started)


class Repository:
    """One repository. `prefix`: what restic is started by (`nice`…); `flags`: of every call.

    `alive` is called now and then while restic works.
    """

    def __init__(
        self,
        location: Location,
        password_file: Path,
        *,
        prefix: Sequence[str] = (),
        flags: Sequence[str] = (),
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._alive = alive
        self.location = location
        self._argv = [
            *prefix,
            *("restic", "--repo", location.url, "--password-file", str(password_file)),
            *location.options,
            *flags,
        ]
        kept = ("PATH", "HOME", "LC_ALL", "SSH_AUTH_SOCK", "TMPDIR")
        self._environment = {name: os.environ[name] for name in kept if name in os.environ}
        self._environment |= {"RESTIC_PROGRESS_FPS": "0.02", **location.environment}

    def start(self, *words: str, cwd: Path | None = None) -> Started:
        """The running command."""
        return Started([*self._argv, *words], self._environment, cwd)

    def run(self, *words: str) -> Completed:
        """Its end, good or bad."""
        with self.start(*words) as started:
            return started.wait(self._alive)

    def must(self, *words: str) -> Completed:
        """Its good end; else what `error` makes of it. Locks are treated as `awaited` does."""
        for _ in self.awaited():
            done = self.run(*words)
            if done.returncode == 0:
                return done
            error = self.error(done)
            if not isinstance(error, Busy):
                break
        raise error

    def awaited(self) -> Iterator[None]:
        """Attempts at what a lock may prevent: those of dead clients are removed, others awaited."""
        until = time.monotonic() + _LOCK_WAIT_S
        yield
        self.run("unlock")  # restic removes what it can tell to be stale, and nothing else
        yield
        while time.monotonic() < until:
            time.sleep(_LOCK_PAUSE_S)
            yield

    def error(self, done: Completed) -> OnedBackupError:
        """What a bad end means."""
        return explain(self.location, done)

    @contextlib.contextmanager
    def mounted(self, directory: Path, *flags: str) -> Iterator[Started]:
        """The repository at `directory`/<tag>/<short id of a restic_snapshot>/…, to read.

        What goes wrong while it is read is an EIO to the reader; `failure` of the error that
        comes out of the block tells which kind it was.
        """
        directory.mkdir(mode=0o700, exist_ok=True)
        for _ in self.awaited():
            mount = self.start("mount", *flags, "--path-template", "%t/%i", str(directory))
            with _unmounted_after_us(directory), mount as started:
                if self._wait_for_mount(started, directory):
                    try:
                        yield started
                    finally:
                        fuse.unmount(directory)
                    return
                error = self.error(started.wait())
            if not isinstance(error, Busy):
                break
        raise error

    def _wait_for_mount(self, started: Started, directory: Path) -> bool:
        deadline = time.monotonic() + _MOUNT_S
        with selectors.DefaultSelector() as selector:
            selector.register(started, selectors.EVENT_READ)
            while not selector.select(0.02):
                if fuse.is_mounted(directory):
                    return True
                if time.monotonic() > deadline:
                    raise Unavailable(f"{self.location.url}: not mounted after {_MOUNT_S:g} s")
        return False


@contextlib.contextmanager
def _unmounted_after_us(directory: Path) -> Iterator[None]:
    """A helper in a session of its own takes the mount away when we end, even if we are killed."""
    helper = subprocess.Popen(
        ["sh", "-c", 'read -r _; exec fusermount3 -u -z -q -- "$1"', "sh", str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        helper.communicate()


def explain(location: Location, done: Completed) -> OnedBackupError:
    """The error for a bad end of restic, or for what it said while it went on."""
    text = done.stderr.decode("utf-8", "replace")
    kind = _CODES.get(done.returncode) or kind_of(text) or DriverFailed
    heard = "subprocess ssh: " in text
    if location.target and heard and issubclass(kind, Unavailable | PermissionDenied):
        said = [
            line.partition("subprocess ssh: ")[2] for line in text.splitlines() if "subprocess ssh: " in line
        ]
        error = ssh.failed(location.target, "\n".join(said).encode())
        if _BANNER not in error.message:
            return error
    if location.target and (_BANNER in text or (not heard and _UNHEARD.search(text))):  # ask ssh again
        try:
            ssh.remote_run(location.target, ["true"])
        except OnedBackupError as error:
            return error
    if kind is PermissionDenied and (done.returncode == 12 or "wrong password" in text):
        return PermissionDenied(f"{location.url}: RESTIC_PASSWORD does not open this repository")
    if kind is NotFound:
        return NotFound(f"{location.url}: there is no repository")
    if kind is Busy:
        return Busy(
            f"{location.url}: {_lock(text)}", hint="restic list locks; restic unlock, if its owner is dead."
        )
    what = _last(text) or f"exit code {done.returncode}"
    if not location.target and kind is PermissionDenied:
        what = f"{KEYS} do not open it: {what}"
    elif "x509: " in text:
        what = f"{UNPROVED}: {what.rpartition('x509: ')[2]}"
    return kind(f"restic: {what} ({location.url})")


def kind_of(text: str) -> type[OnedBackupError] | None:
    """What its messages mean; None if nothing in them is known."""
    return next((kind for pattern, kind in _SAYINGS if re.search(pattern, text)), None)


def _last(text: str) -> str:
    """The line that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [line for line in lines if line.startswith("Fatal:")]
    return (fatal or lines or [""])[-1].removeprefix("Fatal: ")[:400]


def _lock(text: str) -> str:
    found = re.search(r"already locked[^\n]*", text)
    return found.group() if found else "already locked"


def _content(file: IO[bytes]) -> bytes:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), _KEPT_BYTES, max(0, size - _KEPT_BYTES))
