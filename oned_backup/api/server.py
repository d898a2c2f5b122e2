"""Serve the API on the unix socket until SIGTERM or SIGINT, then stop the service in bounded time."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from pathlib import Path

import uvicorn

from oned_backup import __version__
from oned_backup.api.app import make_app
from oned_backup.daemon.service import Service
from oned_backup.errors import Conflict, Misconfigured

logger = logging.getLogger(__name__)

_BACKLOG = 64


def serve(service: Service) -> bool:
    """Run until told to stop; whether everything had ended in time."""
    listener = _listen(service.settings.socket)
    logger.info("oned-backup %s: listening on %s", __version__, service.settings.socket)
    _tell_systemd()
    config = uvicorn.Config(
        make_app(service), log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=2
    )
    # uvicorn stops on these signals and then sends them again, to whoever handled them before.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    service.start()
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        with contextlib.suppress(FileNotFoundError):
            service.settings.socket.unlink()
        ended = service.stop()
    return ended


def _tell_systemd() -> None:
    """Commands can connect from now on: sd_notify(3), for units of Type=notify; else nothing."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        try:
            notify.sendto(b"READY=1", f"\0{address[1:]}" if address.startswith("@") else address)
        except OSError as error:
            logger.warning("systemd cannot be told at %s: %s", address, error.strerror)


def _ignore(_number: int, _frame: object) -> None:
    """The signal was acted upon."""


def _listen(path: Path) -> socket.socket:
    """The listening socket, 0600; `Conflict` if somebody answers there already."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.connect(str(path))
        raise Conflict(f"{path}: another daemon answers there", hint="Give each its own run_dir.")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        hint = "A socket's path has at most 107 characters: choose a shorter run_dir."
        raise Misconfigured(f"{path}: {error.strerror or error}", hint=hint) from error
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)
    return listener
