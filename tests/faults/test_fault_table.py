"""The published fault table is true: every fault has a test that passed or a reason, and nothing is stale."""

from __future__ import annotations

from tests.faults import table


def test_every_fault_has_a_test_or_a_reason() -> None:
    marked = table.marked()
    assert marked.keys() <= table.catalogue().keys()
    for row, fault in table.catalogue().items():
        assert (row in marked) != bool(fault.untested), f"{row}: either a test or a reason why there is none"


def test_every_mark_was_tried_and_none_failed() -> None:
    observed = table.observed()
    for row, files in table.marked().items():
        tried = {test.partition("::")[0] for test in observed.get(row, {})}
        assert tried == files, f"{row}: run its tests with --fault-table"
    failed = [
        (row, test)
        for row, tests in observed.items()
        for test, proof in tests.items()
        if proof.outcome != "passed"
    ]
    assert failed == []


def test_the_document_is_current() -> None:
    proofs = table.observed()
    assert table.merged(proofs, {}) == proofs
    assert table.DOCUMENT.read_text() == table.document(table.catalogue(), proofs), "run: make faults"
