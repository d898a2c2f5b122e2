"""The conformance kit's judgement of the rsync driver, behind a real sshd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sshd import Sshd

from oned_backup.runner.kit import Report
from oned_backup.runner.kit.clause import CLAUSES, Status

#: take minutes over SSH; DS-24 and DS-34, and the fs driver's check, ask the same of the same code
SLOW = {"DS-07", "DS-25", "DS-26", "DS-33", "DS-45"}
DRIVER = Path(__file__).parents[3] / "drivers/datastore/rsync"


@pytest.mark.timeout(1800)
def test_the_rsync_driver_keeps_the_contract(judge: Callable[..., Report], sshd: Sshd) -> None:
    user, _, host = sshd.target.partition("@")
    report = judge(
        DRIVER,
        parameters={"RSYNC_USER": user, "RSYNC_HOST": host},
        ssh_config=sshd.config,
        only=set(CLAUSES) - SLOW,
    )
    assert [f"{clause.clause_id}: {clause.detail}" for clause in report.having(Status.FAILED)] == []
    skipped = {clause.clause_id for clause in report.having(Status.SKIPPED)}
    assert skipped <= {"DS-32", "DS-35", "DS-36"}  # it needs root; there are no secrets
