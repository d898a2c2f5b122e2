"""The conformance kit's judgement of the restic driver, behind a real sshd.

Every call of restic takes the better part of a second, so the whole kit takes a quarter of an hour:
`oned-backup driver check drivers/datastore/restic RESTIC_PASSWORD=@FILE …`. Here are those that say most.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sshd import Sshd

from oned_backup.runner.kit import Report
from oned_backup.runner.kit.clause import Status

DRIVER = Path(__file__).parents[3] / "drivers/datastore/restic"
CLAUSES = {"ALL-03", "DS-13", "DS-20", "DS-31", "DS-35", "DS-36", "DS-40"}


@pytest.mark.whole_matrix  # two minutes; test_restic_s3 has some of its clauses in every run
@pytest.mark.timeout(1200)
def test_the_restic_driver_keeps_the_contract(judge: Callable[..., Report], sshd: Sshd) -> None:
    user, _, host = sshd.target.partition("@")
    report = judge(
        DRIVER,
        parameters={"RESTIC_SFTP_USER": user, "RESTIC_SFTP_SERVER": host, "RESTIC_PASSWORD": "kit of restic"},
        ssh_config=sshd.config,
        only=CLAUSES,
    )
    assert [f"{clause.clause_id}: {clause.detail}" for clause in report.having(Status.FAILED)] == []
    assert {clause.clause_id for clause in report.having(Status.PASSED)} == CLAUSES
