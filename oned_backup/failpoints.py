"""Named places where a test makes a process die, stop or wait; nothing happens unless ODB_FAILPOINTS is set.

    ODB_FAILPOINTS=backup.STORE.acted=kill                 the process that reaches it
    ODB_FAILPOINTS=fs.backup.begun=kill-parent             the daemon, from within its driver
    ODB_FAILPOINTS=fs.backup.begun=kill-both
    ODB_FAILPOINTS=fs.backup.begun=kill:/tmp/once          only as long as the file is there; it goes with it
    ODB_FAILPOINTS=backup.STORE.begun=wait:/tmp/gate       as long as the file is there; it makes it
    ODB_FAILPOINTS=a.b=kill,*=record:/tmp/log              several; `*`: every one, to write them down
    ODB_FAILPOINTS=@/tmp/armed                             what this file holds when one is reached

Of each step of an operation there are, in this order:

    <kind>.<step>.intend    nothing is in the journal yet
    <kind>.<step>.begun     its intent is durable, it has had no effect
    <kind>.<step>.acted     it has had its effect, the outcome is not written
    <kind>.<step>.ended     the outcome is durable

likewise `<kind>.undo-<step>.begun` and so on, `<kind>.END.acted` and `.ended` around the
operation's own end, and of each action of a driver `<driver>.<action>.begun` and `.acted`, with
further ones in the middle such as `fs.backup.rename.begun`.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "ODB_FAILPOINTS"
_POLL_S = 0.01


def _parse(text: str) -> dict[str, str]:
    """What to do, by name; `ValueError` for anything else: a test must not pass for a typing error."""
    armed = {}
    for entry in filter(None, text.split(",")):
        name, _, action = entry.partition("=")
        if action.partition(":")[0] not in {"kill", "kill-parent", "kill-both", "wait", "record"}:
            raise ValueError(f"{VARIABLE}: '{entry}' is no failpoint")
        armed[name] = action
    return armed


_SET = os.environ.get(VARIABLE, "")
_ARMED: Mapping[str, str] = {} if _SET.startswith("@") else _parse(_SET)


_prefix = ""


def enter(prefix: str) -> None:
    """Let all names that this process reaches from now on begin with `prefix` and a dot."""
    global _prefix  # noqa: PLW0603 - a driver's process has one action
    _prefix = f"{prefix}."


def reach(name: str) -> None:
    """Do what is armed for `name`, if anything is."""
    if not _SET:
        return
    name = _prefix + name
    armed = _parse(Path(_SET[1:]).read_text().strip()) if _SET.startswith("@") else _ARMED
    for key in ("*", name):  # it is written down before it acts
        if key in armed:
            _act(name, *armed[key].partition(":")[::2])


def _act(name: str, action: str, argument: str) -> None:
    if action == "record":
        with Path(argument).open("a") as file:
            file.write(f"{name}\n")
    elif action == "wait":
        gate = Path(argument)
        gate.touch()
        while gate.exists():
            time.sleep(_POLL_S)
    else:
        if argument:
            try:
                Path(argument).unlink()
            except FileNotFoundError:
                return
        if action in {"kill-parent", "kill-both"}:
            os.kill(os.getppid(), signal.SIGKILL)
        if action in {"kill", "kill-both"}:
            os.kill(os.getpid(), signal.SIGKILL)
