"""Named places where a test makes a process die, stop or wait; nothing happens unless ODB_FAILPOINTS is set.

    ODB_FAILPOINTS=backup.STORE.acted=kill                      the process that reaches it
    ODB_FAILPOINTS=fs.backup.begun=kill-parent                  the daemon, from within its driver
    ODB_FAILPOINTS=fs.backup.begun=kill-both
    ODB_FAILPOINTS=backup.STORE.begun=wait:/tmp/gate            as long as the file is there; it makes it
    ODB_FAILPOINTS=backup.STORE.acted@2=kill,*=record:/tmp/log  the second time only; write down every name

Of each step of an operation there are, in this order:

    <kind>.<step>.intend    nothing is in the journal yet
    <kind>.<step>.begun     its intent is durable, it has had no effect
    <kind>.<step>.acted     it has had its effect, the outcome is not written
    <kind>.<step>.ended     the outcome is durable

likewise `<kind>.undo-<step>.begun` and so on, `<kind>.END.acted` and `.ended` around the
operation's own end, and of each action of a driver `<driver>.<action>.begun` and `.acted`.
Some drivers have further ones in the middle.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
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


_ARMED: Mapping[str, str] = _parse(os.environ.get(VARIABLE, ""))
_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Do what is armed for `name`, if anything is."""
    if not _ARMED:
        return
    _reached[name] += 1
    for key in ("*", name, f"{name}@{_reached[name]}"):
        if key in _ARMED:
            _act(name, *_ARMED[key].partition(":")[::2])


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
        if action in {"kill-parent", "kill-both"}:
            os.kill(os.getppid(), signal.SIGKILL)
        if action in {"kill", "kill-both"}:
            os.kill(os.getpid(), signal.SIGKILL)
