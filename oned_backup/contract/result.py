"""What a driver prints on success: KEY=VALUE lines.

A value is the rest of the line. Values that are documents (EXPORTS, PLAN, …)
are XML on one line: newlines in their texts are character references. Unknown
keys, and lines that are no KEY=VALUE, are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from oned_backup import xmldoc
from oned_backup.contract.actions import Action
from oned_backup.errors import DriverBug, InvalidInput

_NUMBER = re.compile(r"[0-9]{1,18}")
_LINE = re.compile(r"([A-Z][A-Z0-9_]{0,63})=(.*)")


def parse_result(action: Action, output: bytes) -> dict[str, str]:
    """The known keys of an action's output; `DriverBug` if a required one is absent."""
    known = {*action.required, *action.optional}
    found: dict[str, str] = {}
    for line in output.decode("utf-8", "replace").split("\n"):
        match = _LINE.fullmatch(line.rstrip("\r"))
        if match and match[1] in known:
            found[match[1]] = match[2]
    missing = [key for key in action.required if key not in found]
    if missing:
        raise DriverBug(
            f"{action.kind}/{action.name}: output lacks {', '.join(missing)}",
            hint="See the action's page in share/doc/driver-spec.md.",
        )
    return found


def format_result(values: Mapping[str, str | int | xmldoc.Element]) -> str:
    """The lines for stdout; `DriverBug` for a value that does not fit on a line."""
    lines = []
    for key, value in values.items():
        rendered = str(value) if isinstance(value, str | int) else xmldoc.serialize(value)
        if not _LINE.fullmatch(f"{key}={rendered}"):
            raise DriverBug(f"result {key}: not one line of text")
        lines.append(f"{key}={rendered}\n")
    return "".join(lines)


def whole_number(result: Mapping[str, str], key: str) -> int:
    """The number that `key` carries; `DriverBug` if it is none."""
    if not _NUMBER.fullmatch(result[key]):
        raise DriverBug(f"driver output: {key}={result[key][:40]} is not a whole number")
    return int(result[key])


def document(result: Mapping[str, str], key: str) -> xmldoc.Element:
    """The XML document that `key` carries; `DriverBug` if it is none."""
    try:
        return xmldoc.parse(result[key], what=key)
    except InvalidInput as error:
        raise DriverBug(f"driver output: {error}") from error
