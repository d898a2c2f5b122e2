"""The commands `oned-backup serve`, `doctor`, `metrics` and `config`."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import Annotated

import typer

from oned_backup.cli import output
from oned_backup.cli.session import Json, client, settings_file
from oned_backup.errors import Misconfigured, NoSpace

config_app = typer.Typer(help="Settings.", no_args_is_help=True)

#: malloc.h
_M_ARENA_MAX = -8
_MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}


def serve(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what drivers say, too.")] = False,
) -> None:
    """Run the daemon in the foreground; SIGTERM ends it."""
    import logging  # noqa: PLC0415 - the daemon's own weight, not every command's

    from oned_backup.api.server import serve as serve_api  # noqa: PLC0415
    from oned_backup.config import load_settings  # noqa: PLC0415
    from oned_backup.daemon.service import Service, log_to_stderr  # noqa: PLC0415

    log_to_stderr(logging.DEBUG if verbose else logging.INFO)
    for name in ("alembic", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
    settings = load_settings(settings_file()).settings
    os.umask(0o077)
    _allocate_from_one_arena()
    try:
        service = Service.open(settings)
    except OSError as error:
        kind = NoSpace if error.errno == errno.ENOSPC else Misconfigured
        raise kind(f"{settings.state_dir} cannot be used: {error.strerror or error}") from error
    if not serve_api(service):
        output.warn("some operations did not end in time: the next start brings them to an end")
        sys.stderr.flush()
        raise typer.Exit(1)


def _allocate_from_one_arena() -> None:
    """Keep the daemon from growing: SQLite and libxml2 leave each of the threads' arenas in fragments."""
    import ctypes  # noqa: PLC0415 - the daemon's own weight

    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def doctor(
    uri: Annotated[
        str | None, typer.Option(help="A libvirt to look at (default: those of the hosts).")
    ] = None,
    *,
    json: Json = False,
) -> None:
    """Check what is needed, and how to get what is missing. Works without a daemon."""
    from oned_backup.cli.doctor import examine  # noqa: PLC0415 - loads slowly

    checks = []
    for check in examine(settings_file(), uri):
        checks.append(check)
        if not json:
            output.say(f"{_MARKS[check.status]}  {check.name}: {check.text}")
            if check.remedy and check.status != "ok":
                output.say(f"      {check.remedy}")
    if json:
        output.print_json([vars(check) for check in checks])
    failed = [check.name for check in checks if check.status == "fail"]
    if failed:
        raise Misconfigured(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")


def metrics() -> None:
    """Print what the daemon tells Prometheus. For its textfile collector, or to look at."""
    sys.stdout.write(client().metrics())


@config_app.command()
def show(*, json: Json = False) -> None:
    """Print the effective settings and where each comes from."""
    from oned_backup.config import load_settings  # noqa: PLC0415 - loads slowly

    loaded = load_settings(settings_file())
    if json:
        output.print_json(
            {
                "file": str(loaded.file),
                "file_exists": loaded.file_exists,
                "settings": {key: {"value": value, "from": origin} for key, value, origin in loaded.rows()},
            }
        )
        return
    output.say(f"# {loaded.file}{'' if loaded.file_exists else ' (not there: all defaults)'}")
    for key, value, origin in loaded.rows():
        output.say(f"{f'{key} = {_toml(value)}':<42} # {origin}")


def _toml(value: object) -> str:
    if value is None:
        return '""'
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
