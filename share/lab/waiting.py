"""Waiting for what another process does, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class LabError(RuntimeError):
    """The lab did not do what it was told, within its time."""


def wait_for(what: str, condition: Callable[[], Any], timeout_s: float = 60, *, every_s: float = 0.05) -> Any:
    """The first true value that `condition` gives; `LabError` names `what` did not come."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise LabError(f"no {what} within {timeout_s:g} s")
        time.sleep(every_s)
