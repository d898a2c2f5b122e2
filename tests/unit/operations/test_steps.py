"""The transition tables of all kinds of operations, walked in every possible way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from oned_backup.operations.backup import BACKUP
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.steps import DONE, FAILED, Event, doing, resume_at, transitions
from oned_backup.store import StepState

ALL = list(KINDS.values())


def walks(kind: OperationKind) -> Iterator[list[tuple[str, Event]]]:
    """Every path from the first step to an end, as (state, event), the end last."""
    table = transitions(kind.steps)
    open_paths: list[tuple[str, list[tuple[str, Event]]]] = [(doing(kind.steps[0]), [])]
    while open_paths:
        state, path = open_paths.pop()
        if state in {DONE, FAILED}:
            yield [*path, (state, Event.OK)]
            continue
        assert len(path) < 100, "the table has a circle"
        open_paths += [(table[state, event], [*path, (state, event)]) for event in Event]


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_every_walk_ends(kind: OperationKind) -> None:
    ends = {path[-1][0] for path in walks(kind)}
    assert ends == {DONE, FAILED}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_success_means_every_step_before_the_commit_succeeded(kind: OperationKind) -> None:
    commit = next((place for place, step in enumerate(kind.steps) if step.commits), len(kind.steps) - 1)
    needed = {(doing(step), Event.OK) for step in kind.steps[: commit + 1]}
    for path in walks(kind):
        if path[-1][0] == DONE:
            assert needed <= set(path)


def test_nothing_that_reached_prepare_ends_without_clean() -> None:
    seen = 0
    for path in walks(BACKUP):
        states = [state for state, _ in path]
        if "do:PREPARE" in states:
            seen += 1
            assert "do:CLEAN" in states or "undo:PREPARE" in states
    assert seen > 5


def test_the_checkpoint_advances_only_after_record() -> None:
    for path in walks(BACKUP):
        states = [state for state, _ in path]
        if "do:CLEAN" in states:  # CLEAN told SUCCESS, which removes the parent's checkpoint
            assert path[states.index("do:CLEAN") - 1] == ("do:RECORD", Event.OK)


def test_nothing_is_undone_once_it_is_recorded() -> None:
    for path in walks(BACKUP):
        if ("do:RECORD", Event.OK) in path:
            assert path[-1][0] == DONE
            assert not any(state.startswith("undo:") for state, _ in path)


def test_the_guest_is_helped_before_the_store_is_cleaned() -> None:
    table = transitions(BACKUP.steps)
    assert table["do:STORE", Event.ERROR] == table["do:RECORD", Event.ERROR] == "undo:PREPARE"
    assert table["undo:PREPARE", Event.ERROR] == table["undo:PREPARE", Event.OK] == "undo:STORE"


def test_a_defined_domain_keeps_its_files() -> None:
    table = transitions(KINDS["restore"].steps)
    assert table["undo:DEFINE", Event.ERROR] == FAILED
    assert table["undo:DEFINE", Event.OK] == "undo:PREPARE"


@pytest.mark.parametrize(
    ("journal", "state"),
    [
        ([], FAILED),
        ([("PLAN", "INTENT")], FAILED),
        ([("PLAN", "DONE")], FAILED),
        ([("PLAN", "DONE"), ("PREPARE", "INTENT")], "undo:PREPARE"),
        ([("PLAN", "DONE"), ("PREPARE", "FAILED")], "undo:PREPARE"),
        ([("PLAN", "DONE"), ("PREPARE", "UNDONE")], FAILED),
        ([("PLAN", "DONE"), ("PREPARE", "DONE"), ("STORE", "INTENT")], "undo:PREPARE"),
        ([("PLAN", "DONE"), ("PREPARE", "UNDONE"), ("STORE", "INTENT")], "undo:STORE"),
        ([("PLAN", "DONE"), ("PREPARE", "DONE"), ("STORE", "DONE"), ("RECORD", "INTENT")], "undo:PREPARE"),
        (
            [
                ("PLAN", "DONE"),
                ("PREPARE", "DONE"),
                ("STORE", "DONE"),
                ("RECORD", "DONE"),
                ("CLEAN", "INTENT"),
            ],
            "do:CLEAN",
        ),
        (
            [("PLAN", "DONE"), ("PREPARE", "DONE"), ("STORE", "DONE"), ("RECORD", "DONE"), ("CLEAN", "DONE")],
            DONE,
        ),
    ],
)
def test_where_an_interrupted_backup_goes_on(journal: list[tuple[str, str]], state: str) -> None:
    entries = [(name, StepState(found)) for name, found in journal]
    assert resume_at(BACKUP.steps, entries) == state
