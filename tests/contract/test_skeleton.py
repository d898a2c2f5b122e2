"""A new driver says what is missing, and passes the kit once its author has filled it in."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from textwrap import indent

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
FILLED = Path(__file__).parent / "filled"
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


@pytest.mark.timeout(900)
def test_a_filled_skeleton_in_python_passes(judge: Judge, tmp_path: Path) -> None:
    folder = new_driver(tmp_path, "shelf", Kind.DATASTORE)
    filling = tomllib.loads((FILLED / "python.toml").read_text())
    code = (folder / "driver.py").read_text()
    imports = "from oned_backup.errors import Unsupported\nfrom oned_backup.sdk import Answer, Call, Driver\n"
    assert imports in code
    code = code.replace(imports, filling.pop("imports").lstrip())
    todo = "        raise _todo(call)  # TODO\n"
    for action, body in filling.items():
        head, method, tail = code.partition(f"    def {action}(self, call: Call)")
        assert todo in tail
        code = head + method + tail.replace(todo, indent(body.strip() + "\n", " " * 8), 1)
    assert todo not in code
    (folder / "driver.py").write_text(code)
    assert_passes(judge, folder)


@pytest.mark.timeout(900)
def test_a_filled_skeleton_in_shell_passes(judge: Judge, tmp_path: Path) -> None:
    folder = new_driver(tmp_path, "shelf", Kind.DATASTORE, shell=True)  # noqa: S604
    filling = tomllib.loads((FILLED / "shell.toml").read_text())
    code = (folder / "driver.sh").read_text()
    code = code.replace("\ntodo() {", f"{filling.pop('helpers')}\ntodo() {{")
    for action, body in filling.items():
        assert f"    todo {action} # TODO\n" in code
        code = code.replace(f"    todo {action} # TODO\n", body.lstrip("\n"))
    assert "# TODO\n" not in code
    (folder / "driver.sh").write_text(code)
    subprocess.run(["shellcheck", folder / "driver.sh"], check=True)
    assert_passes(judge, folder)


def assert_passes(judge: Judge, folder: Path) -> None:
    toml = folder / "driver.toml"
    toml.write_text(toml.read_text().replace("TODO: what it is, in a few words", "a directory"))
    report = judge(folder)
    assert report.passed, "\n".join(clause.detail for clause in report.having(Status.FAILED))


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(InvalidInput, match="/proc/x/shelf cannot be made: No such file"):
        new_driver(Path("/proc/x"), "shelf", Kind.DATASTORE)
