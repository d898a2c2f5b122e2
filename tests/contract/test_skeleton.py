"""A new driver says what is missing; tests/e2e/test_write_a_driver.py fills it in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from oned_backup.contract.actions import Kind, actions_of
from oned_backup.contract.request import Request
from oned_backup.errors import Conflict, InvalidInput, Unsupported
from oned_backup.runner.drivers import load_driver
from oned_backup.runner.kit import Report, Status
from oned_backup.runner.run import Invocation, Limits, run_action
from oned_backup.runner.skeleton import new_driver

Judge = Callable[..., Report]
RUFF = Path(sys.executable).parent / "ruff"
KINDS = [(kind, shell) for kind in Kind for shell in (False, True)]


@pytest.mark.parametrize(("kind", "shell"), KINDS)
def test_every_action_of_a_skeleton_says_that_it_is_not_written(
    kind: Kind, shell: bool, tmp_path: Path
) -> None:
    driver = load_driver(new_driver(tmp_path / "drivers", "shelf", kind, shell=shell))
    assert {a.name for a in actions_of(kind) if a.mandatory} <= set(driver.actions)
    (tmp_path / "work").mkdir(mode=0o700)
    for action in driver.actions:
        request = Request(kind, "op-0123456789ab", "test")
        with pytest.raises(Unsupported, match=f"^shelf: {action} is not written yet: replace its TODO"):
            run_action(driver, action, request, Invocation(tmp_path / "work"), limits=Limits(60))


def test_the_kit_fails_an_unfilled_skeleton_by_name(judge: Judge, tmp_path: Path) -> None:
    folder = new_driver(tmp_path, "shelf", Kind.DATASTORE, shell=True)  # noqa: S604
    report = judge(folder, only={"ALL-01", "ALL-02", "DS-01"})
    assert [result.status for result in report.clauses] == [Status.FAILED, Status.PASSED, Status.FAILED]
    assert "summary is still to be written" in report.clauses[0].detail
    assert "backup is not written yet" in report.clauses[2].detail


@pytest.mark.parametrize("kind", list(Kind))
def test_skeletons_are_clean(kind: Kind, tmp_path: Path) -> None:
    folder = new_driver(tmp_path / "sh", "shelf", kind, shell=True)  # noqa: S604
    subprocess.run(["shellcheck", folder / "driver.sh"], check=True)
    python = new_driver(tmp_path / "py", "shelf", kind)
    config = Path(__file__).parents[2] / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        subprocess.run([RUFF, *command, "--quiet", "--config", config, python], check=True)


@pytest.mark.parametrize("name", ["", "-x", "a b", "A", "../x", "1a", "x" * 40, "a.b"])
def test_odd_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be a driver's name"):
        new_driver(tmp_path, name, Kind.DATASTORE)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    new_driver(tmp_path, "shelf", Kind.DATASTORE)
    with pytest.raises(Conflict, match="exists already"):
        new_driver(tmp_path, "shelf", Kind.DATASTORE)


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(InvalidInput, match="/proc/x/shelf cannot be made: No such file"):
        new_driver(Path("/proc/x"), "shelf", Kind.DATASTORE)
