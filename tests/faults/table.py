"""The fault table: which faults there are, which tests prove them, and what the last run saw.

`catalogue.toml` has every fault with what is expected of us. A test says by
`@pytest.mark.fault("guest", "agent hung")` which of them it proves (a parameter may say it as
well), and may tell with `record_property("observed", "…")` what it saw, of one of several faults
with `["its name", "…"]`. A run with `--fault-table` notes the outcomes in `observed.json`,
where tests that did not run keep theirs, and writes `share/doc/fault-table.md` from both.
`test_fault_table.py` fails when the three disagree, so each fault that is marked has been
tried, and each that is not says why.
"""

from __future__ import annotations

import ast
import datetime as dt
import fcntl
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
CATALOGUE = TESTS / "faults" / "catalogue.toml"
OBSERVED = TESTS / "faults" / "observed.json"
DOCUMENT = TESTS.parent / "share" / "doc" / "fault-table.md"

#: group and name of a fault
Row = tuple[str, str]


@dataclass(frozen=True)
class Fault:
    """One row: what is expected, and if there is no test, why."""

    expected: str
    untested: str = ""


@dataclass
class Seen:
    """What a case of a test has shown of one fault, and when; `whole`: it runs with `--whole-matrix` only."""

    outcome: str
    words: list[str]
    seen: str
    whole: bool = False


@dataclass
class Proof:
    """What a test has shown of one fault: each of its cases, by their parameters, when it last ran."""

    cases: dict[str, Seen]

    @property
    def outcome(self) -> str:
        """`passed` if all of them have."""
        return next((case.outcome for case in self.cases.values() if case.outcome != "passed"), "passed")

    @property
    def words(self) -> list[str]:
        """What they told."""
        return list(dict.fromkeys(word for case in self.cases.values() for word in case.words))

    @property
    def seen(self) -> str:
        """When the one that was not run for the longest time was run."""
        return min(case.seen for case in self.cases.values())

    @property
    def whole(self) -> bool:
        """Whether none of them runs by default."""
        return all(case.whole for case in self.cases.values())


def catalogue() -> dict[Row, Fault]:
    """All faults, in the order of the document."""
    groups: dict[str, Any] = tomllib.loads(CATALOGUE.read_text())
    untested = _rows(groups.pop("untested"))
    faults = _rows(groups)
    strange = untested.keys() - faults.keys()
    if strange:
        raise ValueError(f"{CATALOGUE.name}: no such fault: {strange}")
    return {row: Fault(expected, untested.get(row, "")) for row, expected in faults.items()}


def _rows(groups: dict[str, dict[str, str]]) -> dict[Row, str]:
    return {(group, name): text for group, rows in groups.items() for name, text in rows.items()}


def observed() -> dict[Row, dict[str, Proof]]:
    """What the last runs saw, by fault and test."""
    stored = json.loads(OBSERVED.read_text()) if OBSERVED.exists() else {}
    return {
        (group, name): {
            test: Proof({case: Seen(**seen) for case, seen in cases.items()}) for test, cases in tests.items()
        }
        for group, rows in stored.items()
        for name, tests in rows.items()
    }


def marked() -> dict[Row, set[str]]:
    """The files of the tests that say that they prove a fault, from the source alone."""
    found: dict[Row, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for group, name in _marks_in(ast.parse(path.read_text())):
            found.setdefault((group, name), set()).add(str(path.relative_to(TESTS.parent)))
    return found


def _marks_in(tree: ast.AST) -> Iterator[Row]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
            group, name = (ast.literal_eval(argument) for argument in node.args)
            yield group, name


# --- the run


@dataclass
class _Case:
    """One test item: the faults that it proves, how it ended."""

    rows: list[Row]
    whole: bool
    outcome: str = "passed"
    #: an interrupted one has shown nothing
    is_over: bool = False
    #: what it saw, of the fault of that name or, with an empty one, of all of its faults
    words: list[tuple[str, str]] = field(default_factory=list)


class FaultTable:
    """Part of pytest: hears how marked tests end, and writes it down at the end of the run."""

    def __init__(self) -> None:
        self._cases: dict[str, _Case] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said: dict[str, list[Any]] = {}
        for key, value in report.user_properties:
            said.setdefault(key, []).append(value)
        if "fault" not in said:
            return
        rows = [(group, name) for group, name in said["fault"]]
        case = self._cases.setdefault(report.nodeid, _Case(rows, "whole" in said))
        if report.outcome != "passed" and case.outcome != "failed":
            case.outcome = report.outcome
        case.is_over |= report.when == "teardown"
        words = said.get("observed", [])
        case.words = [(word[0], word[1]) if isinstance(word, list) else ("", str(word)) for word in words]

    def pytest_sessionfinish(self) -> None:
        with CATALOGUE.open() as lock:  # of several runs at the same time
            fcntl.flock(lock, fcntl.LOCK_EX)
            write(merged(observed(), self._proofs()))

    def _proofs(self) -> dict[Row, dict[str, Proof]]:
        proofs: dict[Row, dict[str, Proof]] = {}
        today = dt.datetime.now(tz=dt.UTC).date().isoformat()
        for nodeid, case in sorted(self._cases.items()):
            test, _, parameters = nodeid.partition("[")
            for row in case.rows if case.is_over else ():
                words = [text for name, text in case.words if name in {"", row[1]}]
                proof = proofs.setdefault(row, {}).setdefault(test, Proof({}))
                proof.cases[parameters.removesuffix("]")] = Seen(case.outcome, words, today, case.whole)
        return proofs


def note_faults(items: list[pytest.Item]) -> None:
    """Have the reports of marked tests say what they prove; an unknown fault is an error."""
    known = catalogue()
    for item in items:
        for mark in item.iter_markers("fault"):
            if mark.args not in known:
                raise pytest.UsageError(f"{item.nodeid}: {mark.args} is not in {CATALOGUE.name}")
            item.user_properties.append(("fault", list(mark.args)))
            if item.get_closest_marker("whole_matrix"):
                item.user_properties.append(("whole", True))


def merged(old: dict[Row, dict[str, Proof]], new: dict[Row, dict[str, Proof]]) -> dict[Row, dict[str, Proof]]:
    """The old results with the new ones in their places, without those of tests that are no more.

    Cases that did not run keep theirs: a run of some must not hide how the others ended.
    """
    still = marked()
    result: dict[Row, dict[str, Proof]] = {}
    for row in catalogue():
        before, now = old.get(row, {}), new.get(row, {})
        nothing = Proof({})
        proofs = {
            test: _together(before.get(test, nothing), now.get(test, nothing))
            for test in before.keys() | now.keys()
        }
        kept = {test: proofs[test] for test in sorted(proofs) if _exists(test, still.get(row, set()))}
        if kept:
            result[row] = kept
    return result


def _together(old: Proof, new: Proof) -> Proof:
    """A test has either parameters or one case without."""
    kept = {
        case: seen for case, seen in old.cases.items() if not new.cases or bool(case) != ("" in new.cases)
    }
    return Proof({**kept, **new.cases})


def _exists(test: str, files: set[str]) -> bool:
    file, _, name = test.partition("::")
    return file in files and f"def {name.rpartition('::')[2]}(" in (TESTS.parent / file).read_text()


def write(proofs: dict[Row, dict[str, Proof]]) -> None:
    """Note the results, and write the document."""
    stored: dict[str, dict[str, dict[str, Any]]] = {}
    for (group, name), tests in proofs.items():
        stored.setdefault(group, {})[name] = {
            test: {case: vars(proof.cases[case]) for case in sorted(proof.cases)}
            for test, proof in tests.items()
        }
    OBSERVED.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    DOCUMENT.write_text(document(catalogue(), proofs))


# --- the document

_HEAD = """\
# Faults

What can go wrong around a backup, what is expected of us then, and what the last run of the tests saw.
This file is written by `make faults` from `tests/faults/catalogue.toml` and the outcomes of
the tests that are named in the last column; it is not edited by hand.

After each of them the guest runs and is thawed, every restore point that existed restores
byte for byte, no job, socket, scratch file, process or partial backup is left, and the next backup works.

{total} faults: {proved} tried by {tests} tests in {cases} cases, {failing} not as expected, {untested}
untested. Tests with a * are slow and run with `--whole-matrix` only.
"""


def document(faults: dict[Row, Fault], proofs: dict[Row, dict[str, Proof]]) -> str:
    """The text of `fault-table.md`."""
    every = [proof for tests in proofs.values() for proof in tests.values()]
    lines = [
        _HEAD.format(
            total=len(faults),
            proved=len(proofs),
            tests=len({test for tests in proofs.values() for test in tests}),
            cases=sum(len(proof.cases) for proof in every),
            failing=sum(any(p.outcome != "passed" for p in tests.values()) for tests in proofs.values()),
            untested=len(faults.keys() - proofs.keys()),
        )
    ]
    group = ""
    for row, fault in faults.items():
        if row[0] != group:
            group = row[0]
            lines += [f"\n## {group}\n", "| fault | expected | observed | by |", "|---|---|---|---|"]
        cells = (row[1], fault.expected, *_evidence(fault, proofs.get(row, {})))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _evidence(fault: Fault, tests: dict[str, Proof]) -> tuple[str, str]:
    if not tests:
        return f"untested: {fault.untested}" if fault.untested else "**untested**", ""
    words = list(dict.fromkeys(word for proof in tests.values() for word in proof.words))
    bad = [f"**{proof.outcome}**" for proof in tests.values() if proof.outcome != "passed"]
    cases = sum(len(proof.cases) for proof in tests.values())
    text = ", ".join(bad) if bad else "; ".join(words) or "as expected"
    text += f" ({cases} cases)" if cases > 1 else ""
    text += f", {max(proof.seen for proof in tests.values())}"
    return text, "<br>".join(_label(test, proof) for test, proof in tests.items())


def _label(test: str, proof: Proof) -> str:
    file, _, name = test.partition("::")
    return f"`{file.removeprefix('tests/')}` {name.removeprefix('test_').replace('_', ' ')}" + (
        "*" if proof.whole else ""
    )
