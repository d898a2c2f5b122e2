"""Errors of Python's own network modules get the exit code of what they mean: never "a bug"."""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from oned_backup.errors import DriverFailed, NoSpace, OnedBackupError, PermissionDenied, Unavailable
from oned_backup.sdk.failures import explain


@contextmanager
def server(answer: bytes) -> Iterator[int]:
    """The port of a server that reads something, says `answer`, and hangs up."""

    def serve() -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        thread.join()


def raised(port: int, *, tls: bool = False) -> OnedBackupError:
    with pytest.raises((OSError, http.client.HTTPException)) as caught:  # noqa: PT012 - reading may fail as well
        opened = urllib.request.urlopen(f"http{'s' if tls else ''}://127.0.0.1:{port}/", timeout=30)  # noqa: S310
        opened.read()
    return explain(caught.value)


def test_a_server_that_is_not_there_or_breaks_off_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert type(raised(port)) is Unavailable
    for answer in (b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"):
        with server(answer) as port:
            assert type(raised(port)) is Unavailable, answer
    with server(b"this is no TLS") as port:
        assert type(raised(port, tls=True)) is Unavailable


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((401, PermissionDenied), (403, PermissionDenied), (404, DriverFailed), (429, Unavailable)),
        *((500, Unavailable), (503, Unavailable), (507, NoSpace)),
    ],
)
def test_a_status_that_no_driver_expected(status: int, kind: type[OnedBackupError]) -> None:
    with server(f"HTTP/1.1 {status} no\r\nContent-Length: 0\r\n\r\n".encode()) as port:
        assert type(raised(port)) is kind


def test_the_numbers_of_names_and_certificates_are_not_the_systems() -> None:
    assert type(explain(socket.gaierror(socket.EAI_NONAME, "unknown"))) is Unavailable
    assert type(explain(ssl.SSLCertVerificationError(1, "self-signed"))) is PermissionDenied
    assert type(explain(ssl.SSLError(1, "wrong version"))) is Unavailable  # 1 is also EPERM
    assert type(explain(urllib.error.URLError("no host given"))) is Unavailable
    headers = http.client.parse_headers(io.BytesIO(b"\r\n"))
    assert "507" in explain(urllib.error.HTTPError("http://x/", 507, "full", headers, None)).message
