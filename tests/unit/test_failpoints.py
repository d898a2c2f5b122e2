"""Failpoints: armed by an environment variable, and nothing otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from oned_backup import failpoints

REACH = "import sys; from oned_backup.failpoints import reach; [*map(reach, sys.argv[1:])]; print('on')"


def reach(armed: str, *names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REACH, *names],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, failpoints.VARIABLE: armed},
    )


def test_a_process_dies_where_it_was_told_to() -> None:
    assert reach("two=kill", "one", "two").returncode == -signal.SIGKILL
    assert reach("two=kill", "one", "three").stdout == "on\n"


def test_all_names_are_recorded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    reach(f"*=record:{log}", "one", "two", "one")
    assert log.read_text().split() == ["one", "two", "one"]


def test_a_file_says_what_is_armed_now(tmp_path: Path) -> None:
    armed = tmp_path / "armed"
    armed.write_text("one=kill\n")
    assert reach(f"@{armed}", "one").returncode == -signal.SIGKILL
    armed.write_text("")
    assert reach(f"@{armed}", "one").stdout == "on\n"


def test_a_wrong_entry_is_an_error() -> None:
    assert "'one=explode' is no failpoint" in reach("one=explode", "one").stderr


def test_nothing_is_armed_here() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: pytest.fail("a failpoint acts"))
        failpoints.reach("anything")
