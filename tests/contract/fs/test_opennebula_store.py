"""Stores that OpenNebula's rsync driver made are listed, restored and checked; nothing in them is trusted."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from opennebula_store import IDS, UUID, VM_XML, OpenNebulaStore
from stores import Store, run

from oned_backup.contract.request import Backup
from oned_backup.errors import DataCorrupt
from oned_backup.model.manifest import Manifest, parse_manifest


@pytest.fixture
def foreign(store: Store, tmp_path: Path) -> OpenNebulaStore:
    made = OpenNebulaStore(store, tmp_path)
    made.add(IDS[0], 0)
    made.add(IDS[1], 1, "write -P 3 512k 128k", "write -z 6M 64k")
    made.add(IDS[2], 2, "write -P 4 7M 4k")
    return made


def manifests(store: Store) -> dict[str, Manifest]:
    return {one.id: one for one in map(parse_manifest, store.catalogue().manifests)}


def test_every_increment_restores_without_a_change_to_the_store(foreign: OpenNebulaStore) -> None:
    store = foreign.store
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in foreign.folder.rglob("disk*")}
    for number, expected in enumerate(foreign.expected):
        assert store.download(store.url(number)) == expected
    assert store.url() == "fs://100/-/0:a78156,1:c1a00b,2:00ff1e/7/disk.0"
    assert {
        path: (path.stat().st_mtime_ns, path.read_bytes()) for path in foreign.folder.rglob("disk*")
    } == before
    assert any("without checksums: only their form was checked" in line for line in store.logged)


def test_the_catalogue_has_chains_and_identities(foreign: OpenNebulaStore) -> None:
    found = manifests(foreign.store)
    assert {one.id: (one.chain_id, one.parent_id, one.increment_id, one.type) for one in found.values()} == {
        IDS[0]: (IDS[0], "", 0, "FULL"),
        IDS[1]: (IDS[0], IDS[0], 1, "INCREMENT"),
        IDS[2]: (IDS[0], IDS[1], 2, "INCREMENT"),
    }
    assert {(one.vm_id, one.vm_name, one.vm_uuid) for one in found.values()} == {(7, "web <1>", UUID)}
    assert [one.date for one in sorted(found.values(), key=lambda one: one.increment_id)] == [
        1_700_003_600,
        1_700_007_200,
        1_700_010_800,
    ]
    assert found[IDS[0]].disks[0].size_bytes == 8 << 20


def test_the_documents_come_decoded(foreign: OpenNebulaStore) -> None:
    assert foreign.store.plan().file("vm.xml") == VM_XML.encode()


def test_a_second_chain_is_told_apart_by_the_time_of_its_files(foreign: OpenNebulaStore) -> None:
    foreign.add("111111", 0)
    foreign.add("222222", 1, "write -P 5 2M 64k")
    foreign.store.chain[:] = ["111111", "222222"]
    assert foreign.store.download(foreign.store.url(1)) == foreign.expected[4]
    assert manifests(foreign.store)["222222"].chain_id == "111111"
    assert manifests(foreign.store)[IDS[2]].chain_id == IDS[0]


def test_a_flattened_chain_begins_with_its_number(foreign: OpenNebulaStore) -> None:
    """OpenNebula commits into the full image, which then takes the place of the last one merged."""
    run("rm", "-r", foreign.folder / IDS[0])
    merged = foreign.folder / IDS[1] / "disk.0.1"
    foreign_full = foreign.root / "merged"
    foreign_full.write_bytes(foreign.expected[1])
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", foreign_full, merged)
    found = manifests(foreign.store)
    assert (found[IDS[1]].type, found[IDS[1]].chain_id, found[IDS[2]].parent_id) == ("FULL", IDS[1], IDS[1])


MERGED = "20260101-000000-aaaaaa"


def merge(store: Store, *ids: str) -> None:
    """As the daemon does it, until what was merged is gone."""
    place = Backup(id=MERGED, chain_id=IDS[0], increment_id=len(ids) - 1, date=1)
    store.call("increment_flatten", {"MERGE_IDS": ",".join(ids)}, backup=place)
    store.chain[:] = [MERGED, *store.chain[len(ids) :]]
    assert store.url().startswith(f"fs://100/-/1:{MERGED},2:{IDS[2]}/")
    store.call("rm", {"BACKUP_IDS": ",".join(ids)})


def test_what_follows_merged_backups_continues_the_merged_one(foreign: OpenNebulaStore) -> None:
    """Though another chain has an increment of the number of those that are gone."""
    store = foreign.store
    expected = foreign.expected[1:3]
    foreign.add("111111", 0)
    foreign.add("222222", 1, "write -P 5 2M 64k")
    for file in (foreign.folder / "222222").iterdir():
        os.utime(file, (1_700_000_000, 1_700_000_000))
    del store.chain[3:]
    merge(store, *IDS[:2])
    assert [store.download(store.url(number)) for number in (0, 1)] == expected
    found = manifests(store)
    assert (found[IDS[2]].parent_id, found[IDS[2]].chain_id) == (MERGED, IDS[0])
    assert store.failures() == {MERGED: {}, IDS[2]: {}}


def test_nothing_is_guessed_beside_a_damaged_backup_of_ours(foreign: OpenNebulaStore) -> None:
    """It may be the merged one that the increment continues."""
    store = foreign.store
    merge(store, *IDS[:2])
    path = store.path(MERGED) / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"FULL", b"FUSS"))
    with pytest.raises(DataCorrupt, match=f"{MERGED} is damaged"):
        store.ls(INCREMENT_ID="1")


def test_verify_checks_what_can_be_checked(foreign: OpenNebulaStore) -> None:
    assert foreign.store.failures() == {name: {} for name in IDS}
    image = foreign.folder / IDS[1] / "disk.0.1"
    os.truncate(image, image.stat().st_size // 2)
    assert list(foreign.store.failures()[IDS[1]]) == ["disk.0.1"]
    with pytest.raises(DataCorrupt):
        foreign.store.download(foreign.store.url(2))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda folder: (folder / "disk.0.1").write_bytes(b"not an image" * 100), "not a qcow2 file"),
        (lambda folder: (folder / "disk.0.1").rename(folder / "disk.0.9"), "increment 8, which it continues"),
        (
            lambda folder: (folder / "disk.1.4").write_bytes((folder / "disk.0.1").read_bytes()),
            "2 increments",
        ),
        (lambda folder: (folder / "disk.0.rbd2").write_bytes(b""), "only qcow2 images"),
        (lambda folder: (folder / "disk.0.1").unlink(), "is no backup"),
        (lambda folder: (folder / "x").symlink_to("/etc/passwd"), "not what a store has there"),
    ],
)
def test_what_cannot_be_taken_over_is_named_and_hides_nothing_else(
    spoil: Callable[[Path], object], text: str, foreign: OpenNebulaStore
) -> None:
    spoil(foreign.folder / IDS[1])
    catalogue = foreign.store.catalogue()
    unreadable = dict(catalogue.unreadable)
    assert text in unreadable[f"7/{IDS[1]}"]
    assert f"7/{IDS[2]}" in unreadable
    assert [parse_manifest(one).id for one in catalogue.manifests] == [IDS[0]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not base64 !",
        base64.b64encode(b"not xml"),
        base64.b64encode(b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><VM><NAME>&b;</NAME></VM>'),
        base64.b64encode(b"<VM><NAME>x</NAME><TEMPLATE><OS><UUID>../../x</UUID></OS></TEMPLATE></VM>"),
    ],
)
def test_vm_xml_is_not_trusted(content: bytes, foreign: OpenNebulaStore) -> None:
    for name in IDS:
        (foreign.folder / name / "vm.xml").write_bytes(content)
    found = manifests(foreign.store)
    assert {one.vm_name for one in found.values()} == {"one-7"}
    assert len({one.vm_uuid for one in found.values()}) == 1
    assert foreign.store.download(foreign.store.url()) == foreign.expected[-1]


def test_a_backup_of_ours_without_its_manifest_is_damaged_not_foreign(chain: object) -> None:
    store: Store = chain.store  # type: ignore[attr-defined]
    (store.path(store.chain[2]) / "manifest.json").unlink()
    assert [name for name, _ in store.catalogue().unreadable] == [f"7/{store.chain[2]}"]


def test_such_backups_can_be_removed(foreign: OpenNebulaStore) -> None:
    foreign.store.call("rm", {"BACKUP_IDS": IDS[2]})
    assert foreign.store.names() == set(IDS[:2])
    foreign.store.call("rm")
    assert foreign.store.names() == set()
