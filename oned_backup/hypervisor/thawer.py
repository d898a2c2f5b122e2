"""A guest goes on that nobody else lets go on: a process of its own repeats it until it is answered.

An agent that is busy with a freeze (a slow hook, a flush of minutes) is deaf until
that is done, and then the guest is frozen, long after everybody has given up. It
does one thing after the other, so the first thaw that it answers comes after that
freeze. Should it stay deaf for an hour, the next freeze or thaw finds the guest.
Started by `guardian`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

from oned_backup.errors import NotFound, OnedBackupError, Unsupported
from oned_backup.hypervisor import freeze
from oned_backup.hypervisor.connection import connected, libvirt_errors
from oned_backup.hypervisor.domain import Domain, find_domain
from oned_backup.hypervisor.host import host_for

_REPEAT_FOR_S = 3600.0
_INTERVAL_S = 2.0


def repeat(uri: str, uuid: str, note: str = "") -> None:
    """Thaw, or resume, until it is answered; not longer than the domain runs, nor for more than an hour."""
    deadline = time.monotonic() + _REPEAT_FOR_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OnedBackupError):  # no answer yet, or libvirt is being restarted
            _let_go_on(uri, uuid, note)
            return
        time.sleep(_INTERVAL_S)


def _let_go_on(uri: str, uuid: str, note: str) -> None:
    """Return when there is nothing more to do."""
    with connected(uri) as connection, contextlib.suppress(NotFound, Unsupported):
        domain = find_domain(connection, uuid, "")
        if not domain.is_active:
            return
        if note:
            freeze.resume_by_note(host_for(uri, Path("/nonexistent")), domain, Path(note))
        else:
            _thaw(domain)


def _thaw(domain: Domain) -> None:
    # without a limit of ours: libvirt itself gives up after 5 s if the agent is deaf
    with libvirt_errors(f"thaw domain {domain.name}"):
        domain.handle.fsThaw()


if __name__ == "__main__":
    repeat(*sys.argv[1:])
