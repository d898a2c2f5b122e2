"""One thing that `doctor` has looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What was looked at; `status` is ok, warn or fail."""

    name: str
    status: str
    text: str
    remedy: str = ""
