"""The kit passes drivers that are right, and fails each broken one by the clause that it breaks."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from plain_driver import build_plain, failures

from oned_backup.contract.actions import Kind
from oned_backup.errors import InvalidInput
from oned_backup.runner.kit import CLAUSES, Report, Status
from oned_backup.runner.kit.guest import KIB, MIB, make_points, raw_problem

HERE = Path(__file__).parent
BROKEN = sorted(path.name for path in (HERE / "broken").iterdir() if (path / "driver.py").exists())
DRIVERS = HERE.parents[1] / "drivers"


def broken_clause(broken: str) -> tuple[str, str]:
    """The clause that a broken driver breaks, and how: the first line of its driver.py."""
    line = (HERE / "broken" / broken / "driver.py").read_text().split("\n", 1)[0].strip('"')
    clause, _, how = line.partition(": ")
    return clause, how


Judge = Callable[..., Report]


@pytest.mark.whole_matrix  # two minutes; the fs driver's judgement asks all clauses, too
@pytest.mark.timeout(900)
def test_a_correct_driver_passes(judge: Judge, tmp_path: Path) -> None:
    told: list[str] = []
    report = judge(build_plain(tmp_path), on_result=lambda result: told.append(result.clause_id))
    assert report.passed, failures(report)
    assert report.calls is None
    assert told == [clause.clause_id for clause in report.clauses]
    skipped = {clause.clause_id for clause in report.having(Status.SKIPPED)}
    assert skipped <= {"DS-15", *(["DS-32", "DS-46"] if os.geteuid() else [])}
    wanted = {name for name, clause in CLAUSES.items() if Kind.DATASTORE in clause.kinds}
    assert {clause.clause_id for clause in report.clauses} == wanted


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(name, marks=() if number % 3 == 0 else pytest.mark.whole_matrix)
        for number, name in enumerate(BROKEN)
    ],
)
def test_a_broken_driver_fails_by_its_clause(judge: Judge, broken: str, tmp_path: Path) -> None:
    clause_id, _ = broken_clause(broken)
    report = judge(build_plain(tmp_path, broken), only={clause_id})
    assert [result.clause_id for result in report.having(Status.FAILED)] == [clause_id]
    assert not report.passed
    detail = report.having(Status.FAILED)[0].detail
    assert detail.startswith(f"{clause_id}: ")
    if report.calls is not None and "repeat:" in detail:
        script = Path(detail.partition("repeat: sh ")[2].partition("\n")[0])
        assert script.is_file()
        assert (script.parent / "stdin.xml").stat().st_size > 0


def test_there_are_enough_broken_drivers() -> None:
    assert len(BROKEN) >= 14
    assert {broken_clause(broken)[0] for broken in BROKEN} <= set(CLAUSES)


def test_a_failed_call_can_be_repeated(judge: Judge, tmp_path: Path) -> None:
    report = judge(build_plain(tmp_path, "absent_is_unknown"), only={"DS-27"})
    detail = report.having(Status.FAILED)[0].detail
    assert "exit code 69 (Unavailable)" in detail
    assert "66 (NotFound)" in detail
    assert "stderr: cannot open" in detail
    script = detail.partition("repeat: sh ")[2].partition("\n")[0]
    done = subprocess.run(["sh", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (69, "")
    assert "is not there" in done.stderr or "cannot open" in done.stderr or "is no store" in done.stderr


def test_points_of_the_guest_differ(tmp_path: Path) -> None:
    points = make_points(tmp_path / "guest", [(MIB, [["write -P 1 0 64k"], ["write -P 2 64k 64k"]])])
    one, two = (point.disks[0].reference for point in points)
    assert raw_problem(one, two) == f"byte {64 * KIB} differs (sizes: {MIB}, should be {MIB})"
    assert raw_problem(one, one) == ""


def test_writable_by_others_is_refused(judge: Judge, tmp_path: Path) -> None:
    folder = build_plain(tmp_path)
    (folder / "plain.py").chmod(0o666)
    report = judge(folder)
    assert [clause.clause_id for clause in report.having(Status.FAILED)] == ["ALL-01"]
    assert "writable by others" in report.clauses[0].detail


def test_a_given_store_is_not_damaged(judge: Judge, tmp_path: Path) -> None:
    store = tmp_path / "mine"
    store.mkdir()
    (store / "precious").write_text("x")
    only = {"DS-02", "DS-13", "DS-30", "DS-31", "DS-32", "DS-33", "DS-34"}
    report = judge(build_plain(tmp_path), parameters={"BASE_PATH": str(store)}, only=only)
    assert report.passed, failures(report)
    assert [clause.clause_id for clause in report.having(Status.PASSED)] == ["DS-02"]
    assert (store / "precious").read_text() == "x"
    left = [path for path in store.rglob("*") if path.is_file() and stat.S_ISREG(path.stat().st_mode)]
    assert {path.name for path in left} == {"precious", ".plain"}, "the kit removes its backups"


def test_unknown_clause(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no clause DS-99"):
        judge(build_plain(tmp_path), only={"DS-99"})


@pytest.mark.parametrize("kind", ["tm", "vmm"])
def test_our_other_drivers_pass(judge: Judge, kind: str) -> None:
    folders = [path.parent for path in sorted((DRIVERS / kind).glob("*/driver.toml"))]
    assert folders
    for folder in folders:
        report = judge(folder)
        assert report.passed, f"{folder}\n{failures(report)}"
