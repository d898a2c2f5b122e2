"""A store that compresses keeps the contract, and takes less room."""

from __future__ import annotations

from pathlib import Path

import pytest

from oned_backup.runner.kit.check import check_driver
from oned_backup.runner.kit.clause import CLAUSES, Status

ROOT = Path(__file__).parents[3]
#: take long, and have nothing to do with what the files are like
ELSEWHERE = {"DS-07", "DS-24", "DS-25"}


@pytest.mark.timeout(600)
def test_a_store_that_compresses_keeps_the_contract():
    report = check_driver(
        ROOT / "drivers/datastore/fs", parameters={"COMPRESSION": "zstd:1"}, only=set(CLAUSES) - ELSEWHERE
    )
    assert [f"{clause.clause_id}: {clause.detail}" for clause in report.having(Status.FAILED)] == []
