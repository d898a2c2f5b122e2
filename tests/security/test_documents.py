"""Whatever a driver, a store or a hypervisor says: a typed answer or one of our errors, and soon."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oned_backup import xmldoc
from oned_backup.contract.actions import ACTIONS, Kind
from oned_backup.contract.documents import (
    Catalogue,
    Listing,
    RestorePlan,
    StoredDisk,
    VerifiedBackup,
    VerifyReport,
)
from oned_backup.contract.exports import DiskExport, ExcludedDisk, Exports, Reason
from oned_backup.contract.request import Backup, Request
from oned_backup.contract.result import document, parse_result
from oned_backup.errors import DataCorrupt, InvalidInput, OnedBackupError
from oned_backup.model.domain import RestoredDisk, rebuild_domain
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import dump_manifest, parse_manifest
from oned_backup.runner.stderr import StderrReader

DISK = StoredDisk(0, "fs://100/-/0:a/3/disk.0", 1 << 30, "disk.0.0", "ab" * 32)
DOCUMENTS: dict[str, tuple[xmldoc.Element, Callable[[xmldoc.Element], Any]]] = {
    "LISTING": (Listing((DISK, DISK)).to_xml(), Listing.from_xml),
    "PLAN": (RestorePlan("a", 1, (DISK,), (("vm.xml", b"<VM/>"),)).to_xml(), RestorePlan.from_xml),
    "REPORT": (
        VerifyReport((VerifiedBackup("a", 5, (("disk.0.0", "damaged"),)),)).to_xml(),
        VerifyReport.from_xml,
    ),
    "CATALOGUE": (Catalogue(('{"a": 1}',), (("b", "lost"),)).to_xml(), Catalogue.from_xml),
    "EXPORTS": (
        Exports(
            (DiskExport(0, "vda", "disk.0.1", BackupType.INCREMENT, Reason.INCREMENT, 5, "qcow2", "/srv/a"),),
            1,
            "odb-1",
            excluded=(ExcludedDisk("sda", Reason.CDROM),),
            files=("vm.xml",),
        ).to_xml(),
        Exports.from_xml,
    ),
    "REQUEST": (
        Request(
            Kind.DATASTORE, "op-1", "backup", backup=Backup("a", "a", 0, 5), options={"URL": "x"}
        ).to_xml(),
        Request.from_xml,
    ),
    "domain": (
        xmldoc.parse(
            "<domain type='kvm'><name>a</name><memory unit='KiB'>5</memory>"
            "<os><type arch='x86_64'>hvm</type></os>"
            "<devices><disk type='file' device='disk'><source file='/a'/><target dev='vda'/></disk>"
            "<interface type='network'><mac address='52:54:00:00:00:01'/></interface></devices></domain>"
        ),
        lambda root: rebuild_domain(
            root, name="b", disks={"vda": RestoredDisk("/srv/b", "qcow2")}, allowed_roots=["/srv"]
        ),
    ),
}
TEXTS = st.one_of(
    st.sampled_from(
        ["", "-1", "0", "9" * 400, "١٢", "../../etc/passwd", "/", "NaN", "1e9", " 1 ", "\u2028", "a" * 5000]
    ),
    st.text(st.characters(codec="utf-8", min_codepoint=32), max_size=30),
)
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(["drop", "double", "text", "tag", "attribute"]), st.integers(0, 40), TEXTS),
    min_size=1,
    max_size=5,
)


def mutate(root: xmldoc.Element, mutations: list[tuple[str, int, str]]) -> xmldoc.Element:
    root = xmldoc.copy(root)
    for how, place, text in mutations:
        elements = list(root.iter())
        element = elements[place % len(elements)]
        parent = element.getparent()
        if how == "drop" and parent is not None:
            parent.remove(element)
        elif how == "double" and parent is not None:
            parent.append(xmldoc.copy(element))
        elif how == "tag":
            element.tag = "DISK" if len(text) % 2 else "UNKNOWN"
        elif how == "attribute" and len(element.attrib):
            element.set(min(map(str, element.attrib)), text)
        else:
            element.text = text
    return root


@pytest.mark.fault("security", "nonsense where documents, URLs, manifests or answers are due")
@pytest.mark.parametrize("name", DOCUMENTS)
@settings(max_examples=150)
@given(mutations=MUTATIONS)
def test_a_document_is_typed_or_refused(name: str, mutations: list[tuple[str, int, str]]) -> None:
    root, typed = DOCUMENTS[name]
    with contextlib.suppress(OnedBackupError):
        typed(mutate(root, mutations))


@given(
    output=st.binary(max_size=4000),
    action=st.sampled_from(sorted(ACTIONS.values(), key=lambda found: found.name)),
)
@pytest.mark.fault("driver", "answers nonsense where a document is due")
def test_any_output_of_a_driver_is_parsed_or_refused(output: bytes, action: Any) -> None:
    try:
        found = parse_result(action, output)
    except OnedBackupError:
        return
    assert set(found) <= {*action.required, *action.optional}


@given(pieces=st.lists(st.binary(max_size=3000), max_size=20))
def test_any_stderr_is_taken(pieces: list[bytes]) -> None:
    lines: list[str] = []
    reader = StderrReader(secrets=["hunter2"], log=lambda _level, line: lines.append(line))
    for piece in [*pieces, b"the pass", b"word is hunt", b"er2\n"]:
        reader.feed(piece)
    reader.close()
    assert not any("hunter2" in line for line in [*lines, reader.message])
    assert all(line.isprintable() or "\ufffd" in line for line in lines)


MANIFEST: dict[str, Any] = {
    "id": "20261121-000000-abcdef",
    "vm_id": 1,
    "disks": [
        {
            "disk_id": 0,
            "target": "vda",
            "type": "FULL",
            "reason": "first-backup",
            "file": "disk.0.0",
            "size_bytes": 5,
        }
    ],
    "files": [{"name": "disk.0.0", "size_bytes": 5, "blake3": "ab" * 32}],
}
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(key=st.sampled_from(["id", "vm_id", "disks", "files", "increment_id", "date", "replaces"]), value=JSON)
def test_a_manifest_with_a_right_checksum_and_wrong_content_is_refused(key: str, value: Any) -> None:
    try:
        text = dump_manifest({**MANIFEST, key: value})
    except (OnedBackupError, ValueError, TypeError):
        return
    with contextlib.suppress(DataCorrupt):
        parse_manifest(text)


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_damage(data: bytes) -> None:
    with pytest.raises(DataCorrupt):
        parse_manifest(data)
    with pytest.raises(DataCorrupt):
        parse_manifest(json.dumps({"format": data.decode("latin-1")}))


ENTITIES = "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
BOMB = f'<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">{ENTITIES}]><VM>&j;</VM>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file://{path}">]><VM><NAME>&x;</NAME></VM>'
PARAMETER = '<!DOCTYPE a [<!ENTITY % x SYSTEM "file://{path}"> %x;]><VM/>'
DEEP = "<a>" * 100_000 + "</a>" * 100_000


@pytest.mark.parametrize("attack", [BOMB, OUTSIDE, PARAMETER, DEEP, "<VM xmlns:x='y'><x:" + "a" * 20_000_000])
@pytest.mark.fault("odd inputs", "XML bombs, entities, oversized documents")
def test_attacks_by_xml_are_refused_without_reading_anything(attack: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("TOP SECRET")
    text = attack.replace("{path}", str(secret))
    with pytest.raises(InvalidInput) as refused:
        xmldoc.parse(text)
    assert "TOP SECRET" not in str(refused.value)
    assert len(refused.value.message) < 500


@pytest.mark.fault("driver", "answers nonsense where a document is due")
def test_the_documents_of_drivers_come_through_the_same_door() -> None:
    with pytest.raises(OnedBackupError, match=r"not accepted|not well-formed"):
        document({"PLAN": BOMB}, "PLAN")
