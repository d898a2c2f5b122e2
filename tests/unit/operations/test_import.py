"""Import: the catalogue's entries from what a store says it holds, whatever is left in it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oned_backup import xmldoc
from oned_backup.contract.documents import Catalogue
from oned_backup.contract.request import Request
from oned_backup.model.manifest import dump_manifest
from oned_backup.operations.delete import cut_off
from oned_backup.operations.inventory import configure_vm
from oned_backup.store import BackupState, Operation, OperationState

from .conftest import World

UUID = "9a1c2b3d-0000-4000-8000-000000000001"


def manifest(backup_id: str, increment_id: int, parent_id: str = "", **more: Any) -> str:
    disk = {
        "disk_id": 0,
        "target": "vda",
        "type": "INCREMENT" if parent_id else "FULL",
        "reason": "increment" if parent_id else "first-backup",
        "file": f"disk.0.{increment_id}",
        "parent_id": parent_id,
        "size_bytes": 1024,
    }
    backup = {
        "id": backup_id,
        "chain_id": "b0",
        "parent_id": parent_id,
        "increment_id": increment_id,
        "type": disk["type"],
        "date": 1000 + increment_id,
        "checkpoint": f"odb-00000000-{backup_id}",
        "vm": {"id": 0, "name": "web", "uuid": UUID},
        "disks": [disk],
        "files": [],
        **more,
    }
    return json.dumps(json.loads(dump_manifest(backup)))


def imported(world: World, *manifests: str, datastore_id: int = 100) -> Operation:
    text = xmldoc.serialize(Catalogue(manifests).to_xml())
    world.drivers.answers["catalogue"] = lambda _request: {"CATALOGUE": text}
    return world.run("import", datastore_id=datastore_id)


def test_one_of_two_backups_that_failed_and_succeeded_at_one_increment(world: World) -> None:
    done = imported(
        world,
        manifest("b0", 0),
        manifest("b2", 1, "b0", date=1500),
        manifest("b1", 1, "b0", date=1400),
        manifest("b3", 2, "b2"),
    )
    assert done.state is OperationState.DONE, done.error
    assert [row.backup_id for row in world.services.store.backups()] == ["b0", "b2", "b3"]
    assert done.result["unreadable"] == ["backup b1: increment 1 is b2"]


def test_what_continues_a_lost_backup_is_broken(world: World) -> None:
    done = imported(world, manifest("b0", 0), manifest("b2", 2, "b1"), manifest("b3", 3, "b2"))
    assert done.state is OperationState.DONE, done.error
    states = {row.backup_id: row.state for row in world.services.store.backups()}
    assert states == {"b0": BackupState.GOOD, "b2": BackupState.BROKEN, "b3": BackupState.BROKEN}


def test_a_vm_is_frozen_as_it_was_when_it_was_last(world: World) -> None:
    agent, suspend, off = ({"freeze": {"method": method}} for method in ("AGENT", "SUSPEND", "NONE"))
    world.services.store.delete("vm", 0)
    imported(
        world,
        manifest("b0", 0, **suspend),
        manifest("c0", 0, chain_id="c0", date=2000, **agent),
        manifest("c1", 1, "c0", chain_id="c0", date=2001, **off),
    )
    (vm,) = world.services.store.find("vm", uuid=UUID)
    assert vm.element.findtext("BACKUPS/BACKUP_CONFIG/FS_FREEZE") == "AGENT"


def test_what_changes_meanwhile_is_not_imported(world: World) -> None:
    journal = world.services.store.journal

    def removed_meanwhile(_request: Request) -> None:
        journal.enqueue("delete", "vm:0", {"image_id": 0}, vm_id=0)
        delete = journal.claim(lambda operation: operation.kind == "delete")
        assert delete is not None
        journal.finish(delete.id, OperationState.DONE)

    world.drivers.script["catalogue"] = [removed_meanwhile]
    text = xmldoc.serialize(Catalogue((manifest("b0", 0),)).to_xml())
    world.drivers.answers["catalogue"] = lambda _request: {"CATALOGUE": text}
    # not by World.run, which takes the lock of VM 0
    journal.enqueue("import", "datastore:100", {"datastore_id": 100}, datastore_id=100)
    world.run_queued()
    (done,) = journal.list(kind="import")
    assert done.state is OperationState.DONE, done.error
    assert done.result["backups"] == 0
    assert "removed meanwhile" in done.result["unreadable"][0]
    assert imported(world, manifest("b0", 0)).result["backups"] == 1


def merged(increment_id: int, replaces: list[str], parent_id: str = "", **more: Any) -> str:
    more = {"replaces": replaces, "stands_for": replaces[-1:], **more}
    return manifest(more.pop("backup_id", "m"), increment_id, parent_id, **more)


@pytest.mark.parametrize("left", [(), (1,), (0, 1, 2)])
def test_a_merged_backup_counts_and_what_it_replaces_is_left_over(world: World, left: tuple[int]) -> None:
    chain = [manifest("b0", 0), manifest("b1", 1, "b0"), manifest("b2", 2, "b1")]
    result = merged(2, ["b0", "b1", "b2"])
    done = imported(world, *(chain[number] for number in left), result, manifest("b3", 3, "b2"))
    assert done.state is OperationState.DONE, done.error
    assert done.result["left_over"] == [f"backup b{number}: merged into m" for number in left]
    rows = world.services.store.backups()
    assert {row.backup_id: row.state for row in rows} == {"m": BackupState.GOOD, "b3": BackupState.GOOD}
    increments = world.services.image(0).increments
    assert [(i.id, i.parent_id, i.source) for i in increments] == [(2, -1, "m"), (3, 2, "b3")]
    assert world.services.image(0).source == "m"


def test_what_was_merged_in_the_middle_is_bridged(world: World) -> None:
    middle = merged(2, ["b1", "b2"], "b0")
    done = imported(world, manifest("b0", 0), middle, manifest("b3", 3, "b2"), manifest("b4", 4, "b9"))
    assert done.state is OperationState.DONE, done.error
    states = {row.backup_id: row.state for row in world.services.store.backups()}
    good, broken = BackupState.GOOD, BackupState.BROKEN
    assert states == {"b0": good, "m": good, "b3": good, "b4": broken}


def test_the_catalogue_decides_about_a_merge_that_was_not_recorded(world: World) -> None:
    chain = [manifest("b0", 0), manifest("b1", 1, "b0"), manifest("b2", 2, "b1")]
    imported(world, *chain)
    done = imported(world, *chain, merged(1, ["b0", "b1"]))
    assert done.state is OperationState.DONE, done.error
    assert done.result["left_over"] == ["backup m: the catalogue has what was merged into it"]
    assert [row.backup_id for row in world.services.store.backups()] == ["b0", "b1", "b2"]


def test_a_backup_replaces_nothing_of_another_vm(world: World) -> None:
    other = {"id": 9, "name": "db", "uuid": "9a1c2b3d-0000-4000-8000-000000000009"}
    stranger = merged(2, ["b0"], backup_id="n", vm=other, chain_id="n")
    done = imported(world, manifest("b0", 0), stranger)
    assert done.state is OperationState.DONE, done.error
    assert {row.backup_id for row in world.services.store.backups()} == {"b0", "n"}


def test_a_chain_stays_one_through_several_merges(world: World) -> None:
    again = merged(3, ["b0", "b1", "m", "b3"], backup_id="n", stands_for=["b3"])
    done = imported(
        world, again, manifest("b4", 4, "b3", chain_id="m"), manifest("b5", 5, "b4", chain_id="n")
    )
    assert done.state is OperationState.DONE, done.error
    assert done.result["images"] == 1
    assert [increment.source for increment in world.services.image(0).increments] == ["n", "b4", "b5"]


@pytest.mark.parametrize("selected", [True, False])
def test_whether_disks_were_selected_is_known_from_the_backup(world: World, *, selected: bool) -> None:
    excluded = [{"disk_id": 1, "target": "vdb", "reason": "not-selected" if selected else "cdrom"}]
    imported(world, manifest("b0", 0, excluded=excluded))
    assert world.services.image(0).has_selected_disks is selected


def test_what_is_to_be_removed_does_not_come_back(world: World) -> None:
    store = world.services.store
    imported(world, manifest("b0", 0), manifest("b1", 1, "b0"))
    with store.transaction() as tx:
        cut_off(tx, 0, [1])
    done = imported(world, manifest("b0", 0), manifest("b1", 1, "b0"))
    assert done.result["backups"] == 0
    assert done.result["left_over"] == ["backup b1: it is to be removed"]
    assert [row.backup_id for row in store.backups()] == ["b0"]


def test_a_copy_of_a_store_adds_nothing_to_what_the_first_one_keeps(world: World) -> None:
    first = [manifest("b0", 0), manifest("b1", 1, "b0")]
    imported(world, *first)
    copy = world.add_datastore()
    done = imported(world, *first, manifest("b2", 2, "b1"), datastore_id=copy)
    assert done.state is OperationState.DONE, done.error
    assert (done.result["backups"], done.result["known"]) == (0, 2)
    assert "copy of what datastore 100 keeps" in done.result["unreadable"][0]
    assert [row.backup_id for row in world.services.store.backups()] == ["b0", "b1"]
    assert len(world.services.image(0).increments) == 2


def test_the_next_backup_does_not_go_where_something_was_imported_from(world: World) -> None:
    configure_vm(world.services, 0, {"MODE": "FULL"})
    assert world.run("backup", vm_id=0, datastore_id=100).state is OperationState.DONE
    archive = world.add_datastore()
    imported(world, manifest("x", 0, chain_id="x"), datastore_id=archive)
    assert world.run("backup", vm_id=0).result["datastore_id"] == 100
    assert world.run("backup", vm_id=0, datastore_id=archive).state is OperationState.DONE
    assert world.run("backup", vm_id=0).result["datastore_id"] == archive


def test_retention_leaves_an_archive_alone_until_the_vm_is_backed_up_to_it(world: World) -> None:
    archive = world.add_datastore()
    configure_vm(world.services, 0, {"KEEP_LAST": "1", "MODE": "FULL"})
    future = [manifest(f"x{n}", 0, chain_id=f"x{n}", date=4_000_000_000 + n) for n in range(3)]
    imported(world, *future, datastore_id=archive)
    for _ in range(2):
        assert world.run("backup", vm_id=0, datastore_id=100).state is OperationState.DONE
        world.run_queued()
    assert [row.backup_id for row in world.services.store.backups(datastore_id=archive)] == ["x0", "x1", "x2"]
    assert len(world.services.store.backups(datastore_id=100)) == 1
    made = world.run("backup", vm_id=0, datastore_id=archive).result["backup_id"]
    world.run_queued()
    left = {row.backup_id for row in world.services.store.backups(datastore_id=archive)}
    assert left == {"x2", made}
    assert len(world.services.store.backups(datastore_id=100)) == 1
