"""Calls of the daemon's API. Only the standard library: a command starts quickly."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from oned_backup import errors
from oned_backup.errors import DaemonUnreachable, OnedBackupError

#: longer than the daemon's longest answer: a host that does not answer, and long polls
_TIMEOUT_S = 120.0
_LONGEST_ID = 10

_CLASSES: dict[str, type[OnedBackupError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, OnedBackupError)
}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """Calls of the API; errors of the daemon are raised here as what they were there."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, path: str, **query: Any) -> Any:
        """The answer to a GET."""
        given = {name: value for name, value in query.items() if value is not None}
        return self._call("GET", f"/v1/{path}{f'?{urlencode(given)}' if given else ''}")

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to a POST; values that are None are left out."""
        return self._call("POST", f"/v1/{path}", body or {})

    def patch(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a PATCH."""
        return self._call("PATCH", f"/v1/{path}", body)

    def delete(self, path: str) -> Any:
        """The answer to a DELETE."""
        return self._call("DELETE", f"/v1/{path}")

    def resolve(self, kind: str, ref: str) -> int:
        """The id of what a user names by id or name."""
        if ref.isascii() and ref.isdecimal() and len(ref) < _LONGEST_ID:
            return int(ref)
        return int(self.get("resolve", kind=kind, ref=ref)["id"])

    def metrics(self) -> str:
        """What the daemon tells Prometheus."""
        return self._exchange("GET", "/metrics", None)[1].decode()

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        content = None
        if body is not None:
            content = json.dumps({name: value for name, value in body.items() if value is not None})
        status, said = self._exchange(method, path, content)
        try:
            answer = json.loads(said)
        except ValueError as error:
            raise self._unreachable(error) from error
        if status >= http.client.BAD_REQUEST:
            raise error_from(answer)
        return answer

    def _exchange(self, method: str, path: str, content: str | None) -> tuple[int, bytes]:
        """Status and body of the answer."""
        connection = _UnixConnection(self._path)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        except PermissionError as error:
            raise errors.PermissionDenied(
                f"{self._path}: you may not talk to this daemon", hint="Run as the user that it runs as."
            ) from error
        except TimeoutError as error:
            raise errors.Unavailable(
                f"the daemon has not answered within {_TIMEOUT_S:.0f} s",
                hint="It may still be at it: see its log, and try again later.",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def _unreachable(self, error: Exception) -> DaemonUnreachable:
        return DaemonUnreachable(
            f"no daemon answers at {self._path}: {getattr(error, 'strerror', None) or error}",
            hint="Start it with `oned-backup serve`.",
        )


def error_from(body: Mapping[str, Any]) -> OnedBackupError:
    """The error that the API or the journal describes."""
    kind = _CLASSES.get(str(body.get("code")), OnedBackupError)
    return kind(str(body.get("message", "unknown error")), hint=str(body.get("hint") or "") or None)
