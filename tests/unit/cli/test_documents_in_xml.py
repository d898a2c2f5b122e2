"""`show --xml`: the documents as OpenNebula has them; and `vm untrack` at the command line."""

from __future__ import annotations

import re
from pathlib import Path

from lxml import etree

from .conftest import Stack

SCHEMAS = Path(__file__).parents[3] / "share" / "schema" / "opennebula"
NAMESPACE = "http://opennebula.org/XMLSchema"


def test_each_document_is_one_of_opennebulas(stack: Stack) -> None:
    stack.ok("vm", "backup", "web")
    for kind, ref in (("vm", "web"), ("image", "0"), ("datastore", "100"), ("host", "0")):
        text = stack.ok(kind, "show", ref, "--xml").out
        assert text.count("\n") > 10, "indented, for people"
        text = re.sub(r"<STORE_ID>.*</STORE_ID>", "", text)  # ours: driver-spec 3.4
        text = text.replace(f"<{kind.upper()}>", f"<{kind.upper()} xmlns='{NAMESPACE}'>", 1)
        etree.XMLSchema(etree.parse(SCHEMAS / f"{kind}.xsd")).assertValid(etree.fromstring(text))
    assert "<TYPE>FULL</TYPE>" in stack.ok("image", "show", "0", "--xml").out
    missing = stack("image", "show", "9", "--xml")
    assert (missing.code, missing.out) == (66, "")


def test_untrack_ends_the_chain(stack: Stack) -> None:
    stack.ok("vm", "backup", "web")
    assert "the next backup is a full one" in stack.ok("vm", "untrack", "web").out
    assert stack.ok("vm", "show", "web", "--json").json["chain"] is None
    assert "FULL (chain-ended)" in stack.ok("vm", "backup", "web").out
