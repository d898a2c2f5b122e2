"""The request on a driver's stdin."""

from __future__ import annotations

import pytest

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Outcome, Request
from oned_backup.errors import InvalidInput


def test_an_outcome_that_nobody_knows_is_refused() -> None:
    document = Request(Kind.TM, "op-1", "backup", outcome=Outcome.SUCCESS).to_xml()
    assert Request.from_xml(document).outcome is Outcome.SUCCESS
    operation = document.find("OPERATION")
    assert operation is not None
    xmldoc.put(operation, "OUTCOME", "PERHAPS")
    with pytest.raises(InvalidInput, match="OPERATION/OUTCOME: 'PERHAPS'"):
        Request.from_xml(document)
