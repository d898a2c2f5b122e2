"""Refuses requests whose body is too large, announced or not, and such whose query is no text of a URL."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from oned_backup.errors import InvalidInput


class _TooLarge(Exception):
    """The body grew past the limit."""


class BodyLimit:
    """ASGI middleware: 413 for bodies of more than `max_bytes`, 400 for such a query."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not scope.get("query_string", b"").isascii():  # RFC 3986, 2; Starlette would fail on it
            await _refuse(scope, receive, send, 400, "query: characters that are not percent-encoded")
            return
        too_large = f"request body: more than {self._max_bytes} bytes"
        headers = dict(scope["headers"])
        announced = headers.get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            await _refuse(scope, receive, send, 413, too_large)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise _TooLarge
            return message

        try:
            await self._app(scope, counted, send)
        except _TooLarge:
            await _refuse(scope, receive, send, 413, too_large)


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    await JSONResponse(InvalidInput(message).to_json(), status)(scope, receive, send)
