"""What the server is asked to do besides receiving: one fixed script, one connection a request."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from oned_backup.errors import DriverFailed, OnedBackupError, error_for_exit_code
from oned_backup.rsync.arguments import Settings
from oned_backup.rsync.failures import explain_refusal, kind_of_words
from oned_backup.sdk.files import Chunk
from oned_backup.sdk.process import Completed
from oned_backup.sdk.ssh import failed, remote_run, ssh_argv
from oned_backup.ssh.command import FAILED

#: making the data of a backup durable may take its time
_TIMEOUT_S = 3600.0
_BEAT_S = 30.0


@dataclass(frozen=True)
class Space:
    """The file system below BASE_PATH, in bytes."""

    total: int
    used: int
    free: int


@dataclass
class Prepared:
    """What there is of a backup: everything, or the `partial` files, and how large these are."""

    space: Space
    finished: bool = False
    #: the parent's name is there, or none was asked for
    parent: bool = True
    partial: dict[str, int] = field(default_factory=dict)

    @property
    def partial_bytes(self) -> int:
        """How much of it was sent already."""
        return sum(self.partial.values())


class Server:
    """The account on the server.

    `known`: the id of the store in which the daemon has backups, `1` if that is not known, `0` if it has
    none; `alive` is called now and then while the server works, which it may do for long without a word.
    """

    def __init__(self, settings: Settings, *, known: str, alive: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        #: what tells the store from others, once it is prepared for a backup; empty if it has no such thing
        self.store_id = ""
        self._known = known
        self._alive = alive

    def space(self) -> Space:
        """How full it is; `Unavailable` for a store that is not there."""
        return _space(self._ask("monitor", self._known))

    def prepare(self, vm: str, backup_id: str, parent_id: str = "") -> Prepared:
        """Make the folder for a backup that is not finished, and make ready what is in it to be continued."""
        answers = self._ask("prepare", self._known, vm, backup_id, parent_id)
        prepared = Prepared(_space(answers), parent=("parent", "no") not in answers)
        for key, value in answers:
            if key == "finished":
                prepared.finished = True
            elif key == "store":
                self.store_id = value
            elif key == "file":
                size, _, name = value.partition(" ")
                prepared.partial[name] = int(size)
        return prepared

    def receive(self, vm: str, backup_id: str, name: str, offset: int, chunks: Iterable[Chunk]) -> str:
        """Write a file from `offset` on, without rsync; the SHA-256 of what the server then has of it."""
        target = self.settings.target
        argv = ssh_argv(target, self._argv("receive", vm, backup_id, name, str(offset)))
        with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
            process = subprocess.Popen(
                [*self.settings.confined.prefix, *argv], stdin=subprocess.PIPE, stdout=stdout, stderr=stderr
            )
            try:
                assert process.stdin is not None  # noqa: S101 - for the type checker
                with suppress(BrokenPipeError), process.stdin as stdin:
                    for chunk in chunks:
                        stdin.write(chunk)
                with _beating(self._alive):
                    process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            for stream in (stdout, stderr):
                stream.seek(0)
            done = Completed(tuple(argv), process.returncode, stdout.read(), stderr.read())
        if done.returncode == FAILED:
            raise failed(target, done.stderr)
        return dict(self._answers(done))["digest"]

    def publish(self, vm: str, backup_id: str, manifest: bytes, heads: Mapping[str, bytes]) -> None:
        """Make the files durable, then the manifest, then the finished name.

        `heads`: what belongs at the beginning of files that were sent without it.
        """
        lengths = [word for name, head in heads.items() for word in (name, str(len(head)))]
        stdin = b"".join((*heads.values(), manifest))
        self._ask("publish", vm, backup_id, str(len(manifest)), *lengths, stdin=stdin)

    def cancel(self, vm: str, backup_id: str) -> None:
        """Remove what an unfinished backup left."""
        self._ask("cancel", self._known, vm, backup_id)

    def remove(self, vm: str, ids: Sequence[str]) -> None:
        """Remove backups, in this order; what is absent does no harm."""
        self._ask("remove", self._known, vm, *ids)

    def _ask(self, verb: str, *arguments: str, stdin: bytes = b"") -> list[tuple[str, str]]:
        argv = self._argv(verb, *arguments)
        target = self.settings.target
        with _beating(self._alive):
            done = remote_run(target, argv, stdin=stdin, timeout_s=_TIMEOUT_S, check=False)
        return self._answers(done)

    def _argv(self, verb: str, *arguments: str) -> list[str]:
        return ["sh", "-c", _script(), "sh", verb, self.settings.base, *arguments]

    def _answers(self, done: Completed) -> list[tuple[str, str]]:
        answers = [
            _split(line.removeprefix("odb "))
            for line in done.stdout.decode("utf-8", "replace").splitlines()
            if line.startswith("odb ")
        ]
        if not answers:  # not even begun
            raise explain_refusal(self.settings.target, done.last_words)
        if done.returncode != 0:
            raise _explain(self.settings.target, done.returncode, done.last_words)
        return answers


@contextmanager
def _beating(alive: Callable[[], None]) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(_BEAT_S):
            alive()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@cache
def _script() -> str:
    return resources.files("oned_backup.rsync").joinpath("server.sh").read_text()


def _space(answers: list[tuple[str, str]]) -> Space:
    for key, value in answers:
        if key == "space":
            return Space(*(int(number) for number in value.split()))
    raise DriverFailed("the server did not say how full it is")


def _split(text: str) -> tuple[str, str]:
    key, _, value = text.partition(" ")
    return key, value


def _explain(target: str, code: int, words: str) -> OnedBackupError:
    """The error of the script, or of a program that it ran."""
    kind = error_for_exit_code(code)
    if kind is not DriverFailed:
        return kind(f"{target}: {words or 'no message'}")
    # No code of ours: a program has failed and said why.
    kind = kind_of_words(words) or DriverFailed
    return kind(f"{target}: {words or 'no message'} (exit code {code})")
