"""A guest that cannot write while a backup begins, and afterwards can, whatever happens.

    with frozen(host, domain, Mode.AGENT, timeout_s=10, directory=directory, guarded=…) as window:
        begin(…)
    window.method, window.milliseconds, window.warning

A thaw is sent whether or not the freeze was answered: an agent that is slow to
answer may freeze after we have given up. Should the block take longer than the limit,
a watchdog thaws the guest in the middle of it. If the thaw is not answered, or this
process is killed or hangs, another one lets the guest go on (see `guardian`). If the agent is absent
or hangs, the backup goes on without a freeze and with a warning: an image as
after a power cut is better than none. A guest that somebody else had paused or frozen
stays so: that it may be us says a file in the operation's directory on the host, which is
there before the guest stands and goes when it goes on.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import libvirt

from oned_backup import failpoints
from oned_backup.errors import Cancelled, OnedBackupError, Unavailable
from oned_backup.hypervisor.connection import libvirt_errors
from oned_backup.hypervisor.domain import Domain, State
from oned_backup.hypervisor.host import Host

#: names of the files that say that we have suspended a guest, or may have frozen it
SUSPENDED = "suspended"
FROZEN = "frozen"

_THAW_ATTEMPTS = 3
_THAW_TIMEOUT_S = 5.0
#: over the limit of the freeze, before the guardian acts: ours is the one that is met
_LATER_S = 5.0
#: what QEMU's agent answers if the guest is frozen already, or if it must not freeze it: it has not
_NOT_DONE = "has been disabled"


class Mode(StrEnum):
    """How the guest is made consistent."""

    NONE = "NONE"
    AGENT = "AGENT"
    SUSPEND = "SUSPEND"


@dataclass
class Window:
    """What the freeze came to. Complete when the context has been left."""

    requested: Mode
    method: Mode = Mode.NONE
    milliseconds: int = 0
    warning: str = ""


class Guarded(Protocol):
    """`guardian.on_guard` for one guest."""

    def __call__(
        self, *, limit_s: float, note: Path | None = None
    ) -> AbstractContextManager[Callable[[], None]]:
        """Somebody sees that the guest goes on, until what this gives is called."""
        ...


@contextlib.contextmanager
def frozen(
    host: Host, domain: Domain, mode: Mode, *, timeout_s: float, directory: Path, guarded: Guarded
) -> Iterator[Window]:
    """Keep the guest from writing inside the block, as far as `mode` and its agent allow.

    `directory`, on the host, is the operation's own: the notes lie there by which others can help the
    guest should we die.
    """
    window = Window(mode)
    if mode is Mode.NONE:
        yield window
        return
    if domain.state is not State.RUNNING:
        window.warning = "the guest was paused already, and stays so"
        yield window
        return
    if mode is Mode.AGENT:
        if not _agent_is_connected(domain):
            window.warning = "no freeze: the guest's agent is not connected"
            yield window
            return
        note = directory / FROZEN
        host.write_file(note, domain.uuid.encode())
        with guarded(limit_s=timeout_s + _LATER_S) as told:

            def goes_on() -> None:
                told()
                host.remove(note)

            with _by_agent(domain, window, timeout_s, goes_on):
                yield window
    else:
        note = directory / SUSPENDED
        with (
            guarded(limit_s=timeout_s + _LATER_S, note=note) as goes_on,
            _by_suspending(host, domain, window, timeout_s=timeout_s, note=note, goes_on=goes_on),
        ):
            yield window


def thaw(domain: Domain, *, timeout_s: float) -> int:
    """How many file systems the agent has thawed: 0 if none was frozen.

    Safe at any time. `AgentSilent` if the agent does not answer.
    """
    with _bounded_agent(domain, timeout_s), libvirt_errors(f"thaw domain {domain.name}"):
        return int(domain.handle.fsThaw())


def resume_if_noted(host: Host, domain: Domain, directory: Path) -> None:
    """Resume a guest that was suspended by one of ours, whose notes lie below `directory`, and that died."""
    for name in host.names(directory):
        resume_by_note(host, domain, directory / name / SUSPENDED)


def resume_by_note(host: Host, domain: Domain, note: Path) -> None:
    """Resume a guest if `note` says that it was suspended by us; without it, the guest goes on already."""
    if _is_of(host, domain, note):
        _resume(domain)
        host.remove(note)


def thaw_if_noted(host: Host, domain: Domain, directory: Path, *, timeout_s: float) -> None:
    """Thaw a guest that one of ours, whose notes lie below `directory`, may have frozen before it died.

    Without such a note nothing happens: whoever has frozen the guest needs it so. `AgentSilent` if the
    agent does not answer; then the notes stay.
    """
    notes = [directory / name / FROZEN for name in host.names(directory)]
    ours = [note for note in notes if _is_of(host, domain, note)]
    if ours:
        thaw(domain, timeout_s=timeout_s)
    for note in ours:
        host.remove(note)


def _is_of(host: Host, domain: Domain, note: Path) -> bool:
    return host.read_file(str(note), max_bytes=64) == domain.uuid.encode()


def is_paused_by_io_error(domain: Domain) -> bool:
    """Whether QEMU has stopped the guest because one of its writes failed."""
    with libvirt_errors(f"domain {domain.name}"):
        state, reason = domain.handle.state()
    return bool(state == libvirt.VIR_DOMAIN_PAUSED and reason == libvirt.VIR_DOMAIN_PAUSED_IOERROR)


def resume_after_io_error(domain: Domain) -> None:
    """Let a guest that QEMU has stopped repeat its write: for when the cause is gone."""
    if is_paused_by_io_error(domain):
        _resume(domain)


@contextlib.contextmanager
def _by_agent(
    domain: Domain, window: Window, timeout_s: float, goes_on: Callable[[], None]
) -> Iterator[None]:
    started = time.monotonic()
    refused = untouched = False
    count = 0
    watchdog: threading.Timer | None = None
    try:
        try:
            with _bounded_agent(domain, timeout_s), libvirt_errors(f"freeze domain {domain.name}"):
                count = int(domain.handle.fsFreeze())
            window.method = Mode.AGENT
        except Cancelled:
            raise
        except OnedBackupError as error:
            refused, untouched = True, _NOT_DONE in error.message
            stays = "somebody else has frozen the guest, or it must not be: it stays as it is: "
            window.warning = f"no freeze: {stays if untouched else ''}{error.message}"
        else:
            left_s = timeout_s - (time.monotonic() - started)
            watchdog = threading.Timer(max(left_s, 0.0), _thaw_late, [domain, window, timeout_s])
            watchdog.daemon = True
            watchdog.start()
            failpoints.reach("freeze.frozen")
        yield
    finally:
        if watchdog:
            watchdog.cancel()
            watchdog.join()
        certain = untouched or _thaw_for_certain(domain, window, count, refused=refused, timeout_s=timeout_s)
        if not refused:
            window.milliseconds = round((time.monotonic() - started) * 1000)
        if certain:
            goes_on()


@contextlib.contextmanager
def _by_suspending(
    host: Host,
    domain: Domain,
    window: Window,
    *,
    timeout_s: float,
    note: Path,
    goes_on: Callable[[], None],
) -> Iterator[None]:
    host.write_file(note, domain.uuid.encode())
    started = time.monotonic()
    try:
        with libvirt_errors(f"suspend domain {domain.name}"):
            domain.handle.suspend()
        window.method = Mode.SUSPEND
        failpoints.reach("freeze.suspended")
        yield
    finally:
        _resume(domain)
        window.milliseconds = round((time.monotonic() - started) * 1000)
        host.remove(note)
        goes_on()
    if window.milliseconds > timeout_s * 1000:
        window.warning = f"the guest stood still for {window.milliseconds} ms, longer than {timeout_s:g} s"


def _resume(domain: Domain) -> None:
    if domain.state is State.PAUSED:
        with libvirt_errors(f"resume domain {domain.name}"):
            domain.handle.resume()


def _thaw_for_certain(domain: Domain, window: Window, count: int, *, refused: bool, timeout_s: float) -> bool:
    """Thaw the `count` file systems; `Unavailable` if a guest that was frozen may still be.

    False if the agent, which had `refused` to freeze, has not said that the guest goes on. If none is
    frozen any more when it is first asked, somebody else has thawed it before the time.
    """
    for attempt in range(1 if refused else _THAW_ATTEMPTS):
        failure: OnedBackupError | None = None
        try:
            thawed = thaw(domain, timeout_s=min(timeout_s, _THAW_TIMEOUT_S))
            if count and not thawed and not attempt and window.method is Mode.AGENT:
                window.method = Mode.NONE
                window.warning = "somebody else has thawed the guest, perhaps before the backup had begun"
        except OnedBackupError as error:
            failure = error
        if failure is None or not domain.is_active:
            return True
    window.warning += "; the thaw is repeated until the agent answers"
    if not refused:
        raise Unavailable(f"domain {domain.name} may still be frozen: {failure}")
    return False


def _thaw_late(domain: Domain, window: Window, timeout_s: float) -> None:
    window.method = Mode.NONE
    window.warning = f"thawed after {timeout_s:g} s, before the backup had begun"
    with contextlib.suppress(OnedBackupError):
        thaw(domain, timeout_s=timeout_s)


@contextlib.contextmanager
def _bounded_agent(domain: Domain, timeout_s: float) -> Iterator[None]:
    """Have libvirt wait for the agent's answer no longer than `timeout_s`, for the commands inside."""
    with libvirt_errors(f"agent of domain {domain.name}"):
        domain.handle.agentSetResponseTimeout(max(1, round(timeout_s)), 0)
    try:
        yield
    finally:
        # libvirt's default; slow freezes by others are theirs to bound
        with contextlib.suppress(libvirt.libvirtError):
            domain.handle.agentSetResponseTimeout(libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK, 0)


def _agent_is_connected(domain: Domain) -> bool:
    return any(
        target.get("state") == "connected"
        for target in domain.xml().iterfind("devices/channel/target[@name='org.qemu.guest_agent.0']")
    )
