"""One running operation, as its steps see it.

Steps hand each other nothing in memory: what a later step or an undo needs is
in `facts`, which holds exactly what the journal holds. So the undo after a
restart of the daemon sees what the undo in the running daemon would have seen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oned_backup.errors import Cancelled, InvalidInput, OnedBackupError
from oned_backup.operations.caller import Caller
from oned_backup.operations.services import Services
from oned_backup.runner.ahead import Ahead
from oned_backup.runner.run import Cancellation, Log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from oned_backup.store import Operation

#: (step, bytes done, bytes in all)
Report = Callable[[str, int, int], None]


def _nothing(*_: object) -> None:
    """Neither reports nor logs."""


@dataclass
class Context:
    """The operation, its facts, and the means to act."""

    services: Services
    operation: Operation
    cancellation: Cancellation = field(default_factory=Cancellation)
    report: Report = _nothing
    log: Log = _nothing
    lock_fd: int | None = None
    #: what the steps of the current attempt have put into the journal
    facts: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1
    #: the daemon was restarted: make sure of the guest first
    recovering: bool = False
    #: one of its drivers could not be ended: what that was about may still happen
    driver_hangs: bool = False
    #: monotonic time by which all calls of drivers must be over
    budget_until: float | None = None
    #: what the result tells besides: fall-backs, leftovers
    notes: list[str] = field(default_factory=list)
    step: str = ""
    #: drivers that were started ahead of their step
    waiting: list[Ahead] = field(default_factory=list)
    #: whether a user asked for the end; stays true while cleaning up
    cancellation_asked: bool = False

    def __post_init__(self) -> None:
        """Go on counting where the attempt before stopped."""
        self.attempt += int(self.operation.result.get("attempts", 0))
        self.notes += self.operation.result.get("notes", ())

    @property
    def arguments(self) -> Mapping[str, Any]:
        """What the operation was asked to do."""
        return self.operation.arguments

    @property
    def work_dir(self) -> Path:
        """A directory of the operation's own, gone when it ends."""
        path = self.services.settings.work_dir / self.operation.id
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    @property
    def caller(self) -> Caller:
        """Calls drivers; they can be cancelled and show their progress as this step's."""
        step = self.step
        return Caller(
            self.services,
            self.operation.id,
            self.operation.kind,
            cancellation=self.cancellation,
            progress=lambda done, total: self.report(step, done, total),
            log=self.log,
            lock_fd=self.lock_fd,
            budget_until=self.budget_until,
            waiting=self.waiting,
        )

    def backup_caller(self, transfer: str) -> Caller:
        """A caller whose drivers see the directory of the backup's files."""
        source = self.work_dir / "source"
        source.mkdir(mode=0o700, exist_ok=True)
        return replace(self.caller, source_dir=source, transfer=transfer)

    def discard_waiting(self) -> None:
        """End the drivers that were started ahead and are not needed."""
        while self.waiting:
            self.waiting.pop().discard()

    def note(self, text: str) -> None:
        """Tell the user something that is no failure."""
        self.log(4, text)
        if text not in self.notes:
            self.notes.append(text)

    def check_cancelled(self) -> None:
        """Raise `Cancelled` if the operation was."""
        if self.cancellation.cancelled:
            raise Cancelled(f"{self.operation.kind} {self.operation.id} was cancelled")

    @contextmanager
    def uncancellable(self) -> Iterator[None]:
        """Inside, a cancellation that was asked for is not passed on: cleaning up must run."""
        self.cancellation_asked = self.cancellation_asked or self.cancellation.cancelled
        asked, self.cancellation = self.cancellation, Cancellation()
        try:
            yield
        finally:
            self.cancellation = asked

    def remove_work_dir(self) -> None:
        """Remove what the operation kept for itself."""
        shutil.rmtree(self.services.settings.work_dir / self.operation.id, ignore_errors=True)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number among the arguments."""
        value = self.arguments.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInput(f"{self.operation.kind}: argument {name} is {value!r}, not a whole number")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A text among the arguments."""
        return str(self.arguments.get(name) or default)


def describe(error: OnedBackupError) -> str:
    """An error for the journal: JSON with its class, text, hint and exit code."""
    return json.dumps(error.to_json(), ensure_ascii=False)
