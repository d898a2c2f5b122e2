"""A libvirt connection whose errors say what the caller should do next."""

from __future__ import annotations

import contextlib
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
        elif error.get_error_domain() in {libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE}:
            kind = Unavailable
    return kind(f"{what}: {text}")


@contextlib.contextmanager
def connected(uri: str) -> Iterator[Any]:
    """A connection to the libvirt at `uri`; `Unavailable` or `PermissionDenied` if there is none."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # its default prints to stderr
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as error:
        failure = translated(error, f"libvirt at {uri}")
        if isinstance(failure, PermissionDenied | Misconfigured):
            raise failure from error
        raise Unavailable(failure.message) from error
    try:
        yield connection
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()
