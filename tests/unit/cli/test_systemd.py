"""The units for systemd: what they start are commands that there are."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from oned_backup.cli.main import run

UNITS = sorted((Path(__file__).parents[3] / "share/systemd").glob("*.service"))


@pytest.mark.parametrize("unit", UNITS, ids=[unit.stem for unit in UNITS])
def test_what_a_unit_starts(unit: Path) -> None:
    started = [
        line.partition("=")[2] for line in unit.read_text().splitlines() if "Exec" in line.partition("=")[0]
    ]
    assert started
    for line in started:
        program, *words = shlex.split(line.lstrip("-"))
        assert program == "/opt/oned-backup/.venv/bin/oned-backup"
        assert run([*words, "--help"]) == 0, line
