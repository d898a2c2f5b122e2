"""The CPU time that a driver takes before its request is read: interpreter, imports, what it warms up.

Measured as the daemon starts it, ahead of its step and then not needed after all. What the interpreter itself
takes stands first: it includes what this machine has in its site-packages (`python -X importtime -c pass`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from oned_backup.runner.environment import base_environment
from tests.bench.product import ROOT
from tests.bench.table import Row

ACTIONS = (
    "vmm/dummy/dump_xml",
    "vmm/kvm/dump_xml",
    "tm/dummy/pre_backup_live",
    "tm/qcow2/pre_backup_live",
    "tm/qcow2/post_backup_live",
    "datastore/fs/monitor",
    "datastore/fs/backup",
)
_RUNS = 9


def starts() -> list[Row]:
    """A row for the interpreter, and one for each action."""
    programs = {"start of python": [sys.executable, "-c", "pass"]}
    programs |= {f"start of {action}": [str(ROOT / "drivers" / action)] for action in ACTIONS}
    return [Row(f"{name}, CPU time", round(_cpu_ms(argv), 1), unit="ms") for name, argv in programs.items()]


def _cpu_ms(argv: Sequence[str]) -> float:
    """Its CPU time with nothing to read, the median of some runs; the first only makes its bytecode."""
    return median([_once(argv) for _ in range(_RUNS + 1)][1:])


def _once(argv: Sequence[str]) -> float:
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        streams = [(os.POSIX_SPAWN_DUP2, nothing, number) for number in range(3)]
        environment = base_environment() | {"ODB_AHEAD": "1"}
        pid = os.posix_spawn(argv[0], argv, environment, file_actions=streams)
    finally:
        os.close(nothing)
    _, status, usage = os.wait4(pid, 0)
    if status != 0:
        raise RuntimeError(f"{Path(argv[0]).name}: exit {os.waitstatus_to_exitcode(status)}")
    return (usage.ru_utime + usage.ru_stime) * 1000
