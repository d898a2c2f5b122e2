"""What every command has: the settings file that was named, and the daemon's client."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oned_backup.cli.output import say
from oned_backup.client import Client
from oned_backup.errors import InvalidInput
from oned_backup.places import daemon_socket

#: set by --config, before any command runs
_settings_file: list[Path] = []

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Xml = Annotated[bool, typer.Option("--xml", help="Print the document as OpenNebula has it.")]
Wait = Annotated[
    bool,
    typer.Option("--wait/--no-wait", help="Wait for the end (default), or print the id of the operation."),
]


def use_settings_file(path: Path) -> None:
    """Remember the file that --config named."""
    _settings_file[:] = [path]


def settings_file() -> Path | None:
    """The file that --config named."""
    return _settings_file[0] if _settings_file else None


def client() -> Client:
    """A client of the daemon that these settings lead to."""
    return Client(daemon_socket(settings_file()))


def print_document(api: Client, kind: str, number: int) -> None:
    """The document on stdout, as the catalogue has it; secrets are ***."""
    say(api.get(f"documents/{kind}/{number}")["xml"].rstrip("\n"))


def key_values(pairs: list[str]) -> dict[str, str]:
    """KEY=VALUE arguments; keys in upper case, as documents have them."""
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidInput(f"'{pair[:60]}' is not KEY=VALUE")
        if key.upper() in found:
            raise InvalidInput(f"{key.upper()} is given twice")
        found[key.upper()] = value
    return found
