"""Wait for an operation of the daemon's, and learn how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from oned_backup.client.connection import Client, error_from
from oned_backup.errors import OnedBackupError

#: the daemon answers sooner if something happens
_POLL_S = 20.0


def wait_for_end(
    client: Client,
    operation: Mapping[str, Any],
    update: Callable[[Mapping[str, Any]], None] = lambda _view: None,
) -> Mapping[str, Any]:
    """The operation once it has ended; `update` gets each of its states on the way."""
    view, version = operation, 0
    while view["ended_at"] is None:
        view = client.get(f"operations/{operation['id']}", wait_s=_POLL_S, seen=version)
        version = view["version"]
        update(view)
    return view


def error_of(operation: Mapping[str, Any]) -> OnedBackupError:
    """The error of an operation that did not succeed."""
    if operation["error"]:
        return error_from(operation["error"])
    if operation["state"] == "CANCELLED":
        return error_from({"code": "Cancelled", "message": f"{operation['kind']} was cancelled"})
    return OnedBackupError(f"{operation['kind']} {operation['id']} ended as {operation['state']}")
