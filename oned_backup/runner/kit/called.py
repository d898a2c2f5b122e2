"""A recorded call of an action, and what a clause may demand of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.actions import ACTIONS, Kind
from oned_backup.contract.result import document, parse_result
from oned_backup.errors import OnedBackupError, error_for_exit_code
from oned_backup.runner.kit.clause import Unmet
from oned_backup.runner.process import Ending

_SHOWN_BYTES = 2000


@dataclass(frozen=True)
class Called:
    """One finished call; `exit_code` is negative for a signal."""

    action: str
    exit_code: int
    ending: Ending
    stdout: bytes
    stderr: bytes
    directory: Path
    elapsed_s: float

    def unmet(self, text: str) -> Unmet:
        """The failure `text`, with this call: how to repeat it and what it printed."""
        lines = [f"{self.action}: {text}", f"  repeat: sh {self.directory}/repeat.sh"]
        for name, data in (("stdout", self.stdout), ("stderr", self.stderr)):
            shown = data[-_SHOWN_BYTES:].decode("utf-8", "replace").strip()
            lines.append(f"  {name}: {shown or '(nothing)'}")
        return Unmet("\n".join(lines))

    def answer(self, kind: Kind = Kind.DATASTORE) -> dict[str, str]:
        """What it printed, by key; `Unmet` if it failed or a required key is absent."""
        if self.exit_code != 0:
            raise self.unmet(f"ended with {self.ended_with}, but should have succeeded")
        try:
            return parse_result(ACTIONS[kind, self.action], self.stdout)
        except OnedBackupError as error:
            raise self.unmet(error.message) from error

    def element(self, key: str, kind: Kind = Kind.DATASTORE) -> xmldoc.Element:
        """The document that it printed under `key`."""
        try:
            return document(self.answer(kind), key)
        except OnedBackupError as error:
            raise self.unmet(error.message) from error

    def require(self, error: type[OnedBackupError], why: str) -> None:
        """`Unmet` unless it ended with the exit code of `error`."""
        if self.exit_code != error.exit_code:
            wanted = f"{error.exit_code} ({error.__name__})"
            raise self.unmet(f"ended with {self.ended_with}, but {why} is {wanted}")

    @property
    def ended_with(self) -> str:
        """The exit code in words."""
        if self.ending is not Ending.EXITED:
            return f"no end of its own ({self.ending.value}, after {self.elapsed_s:.1f} s)"
        if self.exit_code < 0:
            return f"signal {-self.exit_code}"
        name = error_for_exit_code(self.exit_code).__name__ if self.exit_code else "success"
        return f"exit code {self.exit_code} ({name})"


def write_repeat(directory: Path, executable: Path, variables: Mapping[str, str], stdin: bytes) -> None:
    """Write the script that repeats a call, and its request, into the call's directory."""
    (directory / "stdin.xml").write_bytes(stdin)
    words = [f"{name}={value}" for name, value in sorted(variables.items())]
    (directory / "repeat.sh").write_text(
        "#!/bin/sh\n"
        f"# Secrets that the kit was given are not in {directory}/secrets. NBD exports are gone by now.\n"
        f'cd "$(mktemp -d)" && exec env -i {shlex.join(words)} {shlex.quote(str(executable))} '
        f"< {shlex.quote(str(directory / 'stdin.xml'))}\n"
    )
