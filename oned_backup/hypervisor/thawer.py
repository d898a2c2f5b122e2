"""A thaw for a guest whose agent does not answer now: a process of its own repeats it until it is answered.

An agent that is busy with a freeze (a slow hook, a flush of minutes) is deaf until
that is done, and then the guest is frozen, long after everybody has given up. It
does one thing after the other, so the first thaw that it answers comes after that
freeze. Should it stay deaf for an hour, the next freeze or thaw finds the guest.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

from oned_backup.errors import NotFound, OnedBackupError, Unsupported
from oned_backup.hypervisor.connection import connected, libvirt_errors
from oned_backup.hypervisor.domain import find_domain

_REPEAT_FOR_S = 3600.0
_INTERVAL_S = 2.0


def start(uri: str, uuid: str) -> None:
    """Begin to thaw the domain, and return; the process outlives us."""
    subprocess.Popen(
        [sys.executable, "-m", __name__, uri, uuid],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
    )


def repeat(uri: str, uuid: str) -> None:
    """Thaw until it is answered; not longer than the domain runs, nor for more than an hour."""
    deadline = time.monotonic() + _REPEAT_FOR_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OnedBackupError):  # no answer yet, or libvirt is being restarted
            if _thawed(uri, uuid):
                return
        time.sleep(_INTERVAL_S)


def _thawed(uri: str, uuid: str) -> bool:
    """Whether there is nothing more to do."""
    with connected(uri) as connection:
        try:
            domain = find_domain(connection, uuid, "")
            if domain.is_active:
                # without a limit of ours: libvirt itself gives up after 5 s if the agent is deaf
                with libvirt_errors(f"thaw domain {domain.name}"):
                    domain.handle.fsThaw()
        except (NotFound, Unsupported):
            return True
    return True


if __name__ == "__main__":
    repeat(*sys.argv[1:])
