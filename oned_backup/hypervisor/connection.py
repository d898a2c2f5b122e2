"""A libvirt connection whose errors say what the caller should do next."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import libvirt

from oned_backup.errors import (
    Busy,
    DriverFailed,
    Misconfigured,
    NoSpace,
    NotFound,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
    Unsupported,
)
from oned_backup.ssh.command import wrapper_path
from oned_backup.ssh.libvirt_uri import LibvirtUri, parse_uri

#: for a libvirt on another machine to answer; ssh itself gives up a dead link before
_CONNECT_S = 30.0
#: what libvirt says before the last words of its ssh
_SSH_ENDED = re.compile(r"(?:Cannot recv data|End of file while reading data): (.*)", re.DOTALL)


class CheckpointUnusable(DriverFailed):
    """Libvirt refuses an increment from this checkpoint: a bitmap is missing or broken."""


class AgentSilent(DriverFailed):
    """The guest's agent is absent or does not answer."""


_KINDS: tuple[tuple[type[OnedBackupError], tuple[str, ...]], ...] = (
    (NotFound, ("NO_DOMAIN", "NO_DOMAIN_CHECKPOINT", "NO_DOMAIN_BACKUP")),
    (CheckpointUnusable, ("CHECKPOINT_INCONSISTENT",)),
    (AgentSilent, ("AGENT_UNRESPONSIVE", "AGENT_UNSYNCED", "AGENT_COMMAND_TIMEOUT", "AGENT_COMMAND_FAILED")),
    (Busy, ("OPERATION_TIMEOUT", "OPERATION_INVALID", "RESOURCE_BUSY", "BLOCK_COPY_ACTIVE")),
    (PermissionDenied, ("AUTH_FAILED", "AUTH_CANCELLED", "ACCESS_DENIED", "OPERATION_DENIED")),
    (Unsupported, ("OPERATION_UNSUPPORTED", "NO_SUPPORT", "CONFIG_UNSUPPORTED", "ARGUMENT_UNSUPPORTED")),
    (Unavailable, ("NO_CONNECT", "INVALID_CONN", "RPC", "AUTH_UNAVAILABLE", "CALL_FAILED")),
    (Misconfigured, ("XML_ERROR", "XML_DETAIL", "INVALID_ARG", "XML_INVALID_SCHEMA")),
)

_BY_CODE: dict[int, type[OnedBackupError]] = {
    getattr(libvirt, f"VIR_ERR_{name}"): kind
    for kind, names in _KINDS
    for name in names
    if hasattr(libvirt, f"VIR_ERR_{name}")
}


@contextlib.contextmanager
def libvirt_errors(what: str) -> Iterator[None]:
    """Turn libvirt's errors inside into ours; `what` was attempted."""
    try:
        yield
    except libvirt.libvirtError as error:
        raise translated(error, what) from error


def translated(error: libvirt.libvirtError, what: str) -> OnedBackupError:
    """Our error for one of libvirt's."""
    text = error.get_error_message() or str(error)
    kind = _BY_CODE.get(error.get_error_code(), DriverFailed)
    if kind is DriverFailed:
        if "No space left" in text:
            kind = NoSpace
        elif "Permission denied" in text:
            kind = PermissionDenied
        elif error.get_error_domain() in {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE}:
            kind = Unavailable
    return kind(f"{what}: {text}")


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """A connection to the libvirt at `uri`; `Unavailable` or `PermissionDenied` if there is none.

    Another machine is reached by our ssh with our configuration. That ssh notices a dead link, and then
    every call fails.
    """
    libvirt.registerErrorHandler(lambda *_: None, None)  # its default prints to stderr
    place = parse_uri(uri)
    try:
        connection = _open_remote(place) if place.is_remote else libvirt.open(uri)
    except libvirt.libvirtError as error:
        ended = _SSH_ENDED.search(str(error)) if place.is_remote else None
        if ended:
            raise _ssh_failure(place, ended[1]) from error
        failure = translated(error, f"libvirt at {uri}")
        if isinstance(failure, PermissionDenied | Misconfigured):
            raise failure from error
        raise Unavailable(failure.message, hint="Does libvirtd run there?") from error
    try:
        yield connection
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()


def _ssh_failure(place: LibvirtUri, words: str) -> OnedBackupError:
    """Why the ssh ended by which libvirt was to be reached."""
    if "nc: not found" in words:
        return Misconfigured(
            f"libvirt on {place.machine}: it has neither virt-ssh-helper (libvirt 6.8) nor nc",
            hint=f"Install netcat-openbsd on {place.machine}; a URI with socket= needs it in any case.",
        )
    if words.startswith("virt-ssh-helper"):
        return Unavailable(f"libvirt on {place.machine}: {words.partition(': ')[2]}")
    from oned_backup.ssh.host_keys import explained  # noqa: PLC0415 - not for hosts that are here

    return explained(place.target, words.partition(": Connection reset by peer")[0])


def _open_remote(place: LibvirtUri) -> Any:
    """A connection to another machine's libvirt, within a bounded time: libvirt itself sets none."""
    opened: list[Any] = []
    failed: list[libvirt.libvirtError] = []

    def connect(uri: str) -> None:
        try:
            opened.append(libvirt.open(uri))
        except libvirt.libvirtError as error:
            failed.append(error)

    thread = threading.Thread(target=connect, args=(place.over(wrapper_path()),), daemon=True)
    thread.start()
    thread.join(_CONNECT_S)
    if opened:
        return opened[0]
    if failed:
        raise failed[0]
    raise Unavailable(f"libvirt at {place.text}: no answer within {_CONNECT_S:g} s")
