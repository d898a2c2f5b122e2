"""KEY=VALUE arguments for a driver's parameters, whose secrets stand in a file or come on standard input."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Collection
from pathlib import Path

from oned_backup.cli.session import key_values
from oned_backup.errors import InvalidInput

#: more than this is no password
_MAX_CHARACTERS = 65536


def parameter_values(pairs: list[str], secret: Collection[str]) -> dict[str, str]:
    """The values of KEY=VALUE; of the parameters in `secret` as KEY=@FILE, or KEY=- for standard input.

    `InvalidInput` for a secret that stands in the arguments: every user of the machine can read those.
    """
    values = key_values(pairs)
    asked = [key for key in secret if values.get(key) == "-"]
    if len(asked) > 1 and not sys.stdin.isatty():
        raise InvalidInput(f"{' and '.join(sorted(asked))} cannot both come on standard input")
    return {key: _secret(key, value) if key in secret and value else value for key, value in values.items()}


def _secret(key: str, value: str) -> str:
    if value == "-":
        found = getpass.getpass(f"{key}: ") if sys.stdin.isatty() else sys.stdin.read(_MAX_CHARACTERS + 1)
        return _checked(key, found, "standard input")
    if value.startswith("@"):
        path = Path(value[1:])
        try:
            with path.open(encoding="utf-8") as file:
                return _checked(key, file.read(_MAX_CHARACTERS + 1), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{key}: {path}: {getattr(error, 'strerror', None) or error}") from error
    raise InvalidInput(
        f"{key} is secret, but arguments can be read by every user of the machine",
        hint=f"Give {key}=@FILE, or {key}=- to be asked for it (or to pipe it in). Choose another one now.",
    )


def _checked(key: str, text: str, source: str) -> str:
    """The text without the newline at its end."""
    text = text.removesuffix("\n").removesuffix("\r")
    if not text or len(text) > _MAX_CHARACTERS:
        raise InvalidInput(f"{key}: {source} is empty, or too long for a secret")
    return text
