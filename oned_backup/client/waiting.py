"""Wait for an operation of the daemon's, and learn how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from oned_backup.client.connection import Client, error_from
from oned_backup.errors import DaemonUnreachable, OnedBackupError

#: the daemon answers sooner if something happens
_POLL_S = 20.0
#: for so long a daemon that does not answer may be about to start again
_RESTART_S = 60.0
_PAUSE_S = 0.5
#: none that the daemon has: it answers at once
_ANY = -1


def wait_for_end(
    client: Client,
    operation: Mapping[str, Any],
    update: Callable[[Mapping[str, Any]], None] = lambda _view: None,
    lost: Callable[[], None] = lambda: None,
) -> Mapping[str, Any]:
    """The operation once it has ended; `update` gets each of its states on the way.

    A daemon that is started anew meanwhile is waited for: what it was doing it goes on with, or takes back.
    `lost` is called when it begins not to answer.
    """
    view, version = operation, 0
    silent_since = None
    while view["ended_at"] is None:
        try:
            view = client.get(f"operations/{operation['id']}", wait_s=_POLL_S, seen=version)
        except DaemonUnreachable as error:
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                lost()
            if now - silent_since > _RESTART_S:
                hint = (
                    f"Started again, it tells what became of it: `oned-backup operation show {view['id']}`."
                )
                raise DaemonUnreachable(error.message, hint=hint) from error
            version = _ANY
            time.sleep(_PAUSE_S)
            continue
        silent_since = None
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
