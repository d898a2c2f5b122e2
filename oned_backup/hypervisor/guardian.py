"""Who lets a guest go on when the process that has frozen it cannot: a process of its own, started before.

    with on_guard(uri, uuid, limit_s=15) as goes_on:
        freeze(), …, thaw()
        goes_on()

The guardian waits on a pipe. A word comes when the guest goes on: it ends. The pipe
closes without a word, because we were killed or got no answer, or nothing comes for `limit_s`,
because we hang: it becomes a `thawer`. It has a session of its own, so that what ends a driver
does not end it; until it is needed it is a shell, and starting it costs a millisecond.
"""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from oned_backup.errors import Unsupported
from oned_backup.hypervisor import freeze
from oned_backup.hypervisor.connection import AgentSilent
from oned_backup.hypervisor.domain import Domain
from oned_backup.hypervisor.host import Host

_THAW_TIMEOUT_S = 5.0
_THAWER = "oned_backup.hypervisor.thawer"
#: a signal that is meant for a whole service must not take away the guest's last help
_WAIT = """trap '' HUP INT TERM; timeout -s KILL "$0" grep -q . || exec "$@" """


def thaw_if_noted(uri: str, host: Host, domain: Domain, directory: Path) -> str:
    """`freeze.thaw_if_noted`; what to tell people if the agent cannot answer.

    It may be at a freeze, and done with it only later: a process that outlives us repeats the thaw.
    """
    try:
        freeze.thaw_if_noted(host, domain, directory, timeout_s=_THAW_TIMEOUT_S)
    except AgentSilent as error:
        _start(_thawer(uri, domain.uuid, None), stdin=subprocess.DEVNULL)
        return f"{error.message}; the thaw is repeated until the agent answers"
    except Unsupported as error:  # the domain has none
        return error.message
    return ""


@contextlib.contextmanager
def on_guard(
    uri: str, uuid: str, *, limit_s: float, note: Path | None = None
) -> Iterator[Callable[[], None]]:
    """From here on somebody else sees that the guest goes on, until what this gives is called.

    It is thawed; with `note`, it is resumed if that file on its host says that we have suspended it.
    """
    argv = ["sh", "-c", _WAIT, str(math.ceil(limit_s)), *_thawer(uri, uuid, note)]
    process = _start(argv, stdin=subprocess.PIPE)
    assert process.stdin is not None  # noqa: S101 - it is a pipe
    pipe = process.stdin

    def goes_on() -> None:
        with contextlib.suppress(BrokenPipeError):  # the limit was over, it is at work already
            pipe.write(b"thawed\n")

    with pipe:
        yield goes_on


def _thawer(uri: str, uuid: str, note: Path | None) -> list[str]:
    return [sys.executable, "-m", _THAWER, uri, uuid, *([] if note is None else [str(note)])]


def _start(argv: Sequence[str], *, stdin: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        stdin=stdin,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        bufsize=0,
    )
