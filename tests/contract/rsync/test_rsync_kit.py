"""The conformance kit's judgement of the rsync driver, behind a real sshd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sshd import Sshd

from oned_backup.runner.kit import Report
from oned_backup.runner.kit.clause import Status

#: All of them take five minutes and more over SSH: `oned-backup driver check drivers/datastore/rsync …`.
#: These say most of what is the rsync driver's own; the rest asks what the fs driver's check asks.
ASKED = {
    *("ALL-03", "DS-01", "DS-13", "DS-20", "DS-31", "DS-40"),
}
DRIVER = Path(__file__).parents[3] / "drivers/datastore/rsync"


@pytest.mark.timeout(1800)
def test_the_rsync_driver_keeps_the_contract(judge: Callable[..., Report], sshd: Sshd) -> None:
    user, _, host = sshd.target.partition("@")
    report = judge(
        DRIVER,
        parameters={"RSYNC_USER": user, "RSYNC_HOST": host},
        ssh_config=sshd.config,
        only=ASKED,
    )
    assert [f"{clause.clause_id}: {clause.detail}" for clause in report.having(Status.FAILED)] == []
    assert {clause.clause_id for clause in report.having(Status.PASSED)} == ASKED
