"""Clauses, what became of each, and the report.

A clause is a function that takes the `Bench` and returns if the driver keeps it,
raises `Unmet` if it does not, and `NotApplicable` if it cannot be judged here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from oned_backup.contract.actions import Kind

if TYPE_CHECKING:
    from oned_backup.runner.kit.bench import Bench


class Status(StrEnum):
    """What became of a clause."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Unmet(Exception):
    """The driver breaks the clause; the text says how, and how to see it again."""


class NotApplicable(Exception):
    """The clause cannot be judged here; the text says why."""


@dataclass(frozen=True)
class ClauseResult:
    """What became of a clause; `detail` says why it failed or was skipped."""

    clause_id: str
    title: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All clauses in order. `calls`: the directory with what was run, kept if something failed."""

    folder: Path
    clauses: tuple[ClauseResult, ...]
    calls: Path | None = None

    def having(self, status: Status) -> tuple[ClauseResult, ...]:
        """The clauses with that status."""
        return tuple(clause for clause in self.clauses if clause.status is status)

    @property
    def passed(self) -> bool:
        """No clause failed, and at least one was judged: testing nothing is a failure."""
        return not self.having(Status.FAILED) and bool(self.having(Status.PASSED))


Check: TypeAlias = "Callable[[Bench], None]"


@dataclass(frozen=True)
class Clause:
    """One sentence of the contract and the function that judges it."""

    clause_id: str
    title: str
    kinds: frozenset[Kind]
    check: Check


_KINDS = {"DS": frozenset({Kind.DATASTORE}), "VMM": frozenset({Kind.VMM})}

#: all clauses by id
CLAUSES: dict[str, Clause] = {}


def clause(clause_id: str, title: str) -> Callable[[Check], Check]:
    """Enter a function into `CLAUSES`. Ids that begin with DS- are for datastores, ALL- for all kinds.

    Those with VMM- are for hypervisors.
    """
    kinds = _KINDS.get(clause_id.partition("-")[0], frozenset(Kind))

    def enter(check: Check) -> Check:
        if clause_id in CLAUSES:
            raise ValueError(f"clause {clause_id} is there twice")
        CLAUSES[clause_id] = Clause(clause_id, title, kinds, check)
        return check

    return enter
