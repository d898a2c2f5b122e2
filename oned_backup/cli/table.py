"""Tables without lines, folded where they are wider than the terminal; ten thousand rows take no time."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

_GAP = "   "
_NARROWEST = 6


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> Iterator[str]:
    """The lines of a table; a column is right-aligned if its name ends with `>`.

    The widest columns are folded until it fits `width`. Control characters are shown as `?`.
    """
    right = [name.endswith(">") for name in columns]
    names = [name.rstrip(">") for name in columns]
    texts = [["" if cell is None else _printable(str(cell)) for cell in row] for row in rows]
    wanted = [max(map(_cells, column)) for column in zip(names, *texts, strict=True)]
    widths = _fitted(wanted, width - len(_GAP) * (len(columns) - 1))
    yield _line(names, widths, right)
    yield "─" * (sum(widths) + len(_GAP) * (len(columns) - 1))
    for row in texts:
        if widths == wanted:
            yield _line(row, widths, right)
        else:
            folded = [textwrap.wrap(cell, room) for cell, room in zip(row, widths, strict=True)]
            for cells in zip_longest(*folded, fillvalue=""):
                yield _line(cells, widths, right)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = []
    for cell, width, is_right in zip(cells, widths, right, strict=True):
        space = " " * (width - _cells(cell))
        padded.append(space + cell if is_right else cell + space)
    return _GAP.join(padded).rstrip()


def _fitted(widths: Sequence[int], room: int) -> list[int]:
    """The widths with the widest ones cut until they fit, though never below `_NARROWEST`."""
    fitted = list(widths)
    while (excess := sum(fitted) - room) > 0:
        widest = max(fitted)
        if widest <= _NARROWEST:
            break
        rest = [width for width in fitted if width < widest]
        cut = min(excess, widest - max(rest, default=_NARROWEST) or 1)
        fitted[fitted.index(widest)] = max(widest - cut, _NARROWEST)
    return fitted


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def _cells(text: str) -> int:
    """How many columns of a terminal `text` takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
