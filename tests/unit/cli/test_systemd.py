"""The units for systemd: what they start are commands that there are."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from oned_backup.cli.main import run

UNITS = sorted((Path(__file__).parents[3] / "share/systemd").glob("*.service"))
PROGRAM = "/opt/oned-backup/.venv/bin/oned-backup"


@pytest.mark.parametrize("unit", UNITS, ids=[unit.stem for unit in UNITS])
def test_what_a_unit_starts(unit: Path) -> None:
    started = re.findall(rf"^#?Exec\w+=.*?{PROGRAM} ([a-z -]+)", unit.read_text(), flags=re.MULTILINE)
    assert started
    for words in started:
        assert run([*shlex.split(words), "--help"]) == 0, words


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_them(tmp_path: Path) -> None:
    for unit in UNITS[0].parent.iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace(PROGRAM, f"{sys.prefix}/bin/oned-backup"))
    units = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *units],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("answers", [True, False])
def test_metrics_are_replaced_as_a_whole(tmp_path: Path, answers: bool) -> None:
    unit = (UNITS[0].parent / "oned-backup-metrics.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, flags=re.MULTILINE)
    program = tmp_path / "oned-backup"
    program.write_text("#!/bin/sh\necho $1\n" if answers else "#!/bin/sh\nexit 5\n")
    program.chmod(0o755)
    file = tmp_path / "oned-backup.prom"
    file.write_text("old\n")
    done = subprocess.run(
        shlex.split(line.replace(PROGRAM, str(program))), check=False, env={"FILE": str(file), "PATH": "/bin"}
    )
    assert (done.returncode, file.read_text()) == ((0, "metrics\n") if answers else (5, "old\n"))
