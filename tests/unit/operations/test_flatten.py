"""Merging increments: what is asked of the driver, what the catalogue says after, and whom it waits for."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from oned_backup import xmldoc
from oned_backup.contract.documents import VerifiedBackup, VerifyReport
from oned_backup.contract.request import Request
from oned_backup.errors import Cancelled, DataCorrupt, NoSpace, Unavailable
from oned_backup.model.image import Image
from oned_backup.model.manifest import dump_manifest, parse_manifest
from oned_backup.model.names import checkpoint_name
from oned_backup.model.pruning import pinned, to_remove, with_pin
from oned_backup.operations.context import Context
from oned_backup.operations.damage import mark_broken
from oned_backup.operations.delete import queue_overdue
from oned_backup.operations.engine import run_operation
from oned_backup.operations.inventory import configure_vm
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.recovery import recover
from oned_backup.runner.run import Cancellation
from oned_backup.store import BackupState, Operation, OperationState

from .conftest import World
from .test_recovery import Died, killed_in


def merged(world: World) -> Any:
    """An answer like that of a driver that merges, with a manifest or without."""

    def answer(request: Request) -> dict[str, str]:
        backup = request.backup
        assert backup is not None
        ids = request.options["MERGE_IDS"].split(",")
        raw = dict(parse_manifest(world.services.store.backup(ids[-1]).manifest).raw)
        first = parse_manifest(world.services.store.backup(ids[0]).manifest)
        raw |= {"id": backup.id, "type": first.type, "parent_id": first.parent_id}
        raw |= {"replaces": ids, "stands_for": [*raw.get("stands_for", []), ids[-1]]}
        raw["disks"] = [{**disk, "type": first.type, "parent_id": first.parent_id} for disk in raw["disks"]]
        chain = f"{backup.increment_id}:{backup.id}"
        text = json.dumps(json.loads(dump_manifest(raw)))
        return {"BACKUP_ID": backup.id, "SIZE_MB": "9", "CHAIN": chain, "MANIFEST": text}

    return answer


@pytest.fixture
def chain(world: World) -> list[str]:
    """The backup ids of image 0 with five increments, in a store whose driver can merge."""
    world.drivers.answers["increment_flatten"] = merged(world)
    return [str(world.run("backup", vm_id=0).result["backup_id"]) for _ in range(5)]


def flatten(world: World, *increment_ids: int, **more: Any) -> Operation:
    return world.run("flatten", vm_id=0, image_id=0, increment_ids=list(increment_ids), **more)


def sources(world: World) -> list[tuple[int, int, str, str]]:
    return [
        (entry.id, entry.parent_id, entry.source, entry.type.value)
        for entry in world.services.image(0).increments
    ]


def test_the_full_backup_and_two_increments_become_one(world: World, chain: list[str]) -> None:
    world.services.store.mark_backup(chain[3], verified_at=7.0)
    done = flatten(world, 0, 1, 2)
    assert done.state is OperationState.DONE, done.error
    assert world.step_names(done) == ["PLAN DONE", "MERGE DONE", "SWITCH DONE"]
    new = done.result["backup_id"]
    assert sources(world) == [
        (2, -1, new, "FULL"),
        (3, 2, chain[3], "INCREMENT"),
        (4, 3, chain[4], "INCREMENT"),
    ]
    image = world.services.image(0)
    assert image.size_mb == 9 + 5 + 5
    assert image.source == chain[0]
    assert to_remove(image) == tuple(chain[:3])
    (request,) = world.drivers.requests("increment_flatten")
    assert request.options == {"MERGE_IDS": ",".join(chain[:3]), "NEW_ID": "YES"}
    assert request.backup is not None
    assert (request.backup.id, request.backup.increment_id, request.backup.parent_id) == (new, 2, "")
    assert request.backup.date == image.increments[0].date
    rows = {row.increment_id: row for row in world.services.store.backups(image_id=0)}
    assert list(rows) == [2, 3, 4]
    assert rows[2].backup_id == new
    assert rows[3].verified_at == 7.0


def test_increments_in_the_middle_continue_what_the_first_continued(world: World, chain: list[str]) -> None:
    done = flatten(world, 2, 3)
    new = done.result["backup_id"]
    assert sources(world)[1:] == [
        (1, 0, chain[1], "INCREMENT"),
        (3, 1, new, "INCREMENT"),
        (4, 3, chain[4], "INCREMENT"),
    ]


def test_what_was_merged_leaves_the_store_afterwards(world: World, chain: list[str]) -> None:
    done = flatten(world, 0, 1)
    (queued,) = world.services.store.journal.list(state=OperationState.QUEUED)
    assert (queued.id, queued.kind, queued.lock) == (done.result["remove"], "remove", "removal:0")
    world.run_queued()
    (request,) = world.drivers.requests("rm")
    assert request.options["BACKUP_IDS"] == f"{chain[0]},{chain[1]}"
    assert to_remove(world.services.image(0)) == ()
    assert world.services.store.journal.get(queued.id).result["removed"] == chain[:2]


@pytest.mark.fault("store", "unreachable at delete")
def test_a_store_that_cannot_remove_is_asked_again_by_the_next_retention(
    world: World, chain: list[str]
) -> None:
    world.drivers.script["rm"] = [Unavailable("no route to host")] * 200
    flatten(world, 0, 1)
    world.run_queued()
    assert to_remove(world.services.image(0)) == tuple(chain[:2])
    world.drivers.script["rm"] = []
    again = world.run("retention", vm_id=0)
    assert len(again.result["queued"]) == 1
    world.run_queued()
    assert to_remove(world.services.image(0)) == ()


@pytest.mark.fault("store", "unreachable at delete")
def test_a_store_that_cannot_remove_is_asked_again_a_day_later(world: World, chain: list[str]) -> None:
    """Also of a VM that is not backed up any more."""
    world.drivers.script["rm"] = [Unavailable("no route to host")] * 200
    flatten(world, 0, 1)
    world.run_queued()
    assert to_remove(world.services.image(0)) == tuple(chain[:2])
    world.drivers.script["rm"] = []
    services = world.services
    assert queue_overdue(services) == 0
    tomorrow = replace(services, clock=lambda: services.clock() + 86_400)
    assert queue_overdue(tomorrow) == 1
    assert queue_overdue(tomorrow) == 0, "it is queued"
    world.run_queued()
    assert to_remove(services.image(0)) == ()
    assert queue_overdue(tomorrow) == 0


@pytest.mark.parametrize("keep", [1, 2])
def test_the_next_backup_is_an_increment_with_the_checkpoint_of_the_newest(
    world: World, chain: list[str], keep: int
) -> None:
    configure_vm(world.services, 0, {"KEEP_LAST": str(keep)})
    world.run("retention", vm_id=0)
    world.run_queued()
    installation = world.services.store.installation
    assert len(world.services.image(0).increments) == keep
    done = world.run("backup", vm_id=0)
    assert (done.result["type"], done.result["increment_id"]) == ("INCREMENT", 5)
    prepare = world.drivers.requests("pre_backup")[-1]
    assert prepare.parent is not None
    assert prepare.parent.checkpoint == checkpoint_name(installation, chain[-1])
    world.drivers.script["backup"] = [NoSpace("full")]
    world.run_queued()
    world.run("backup", vm_id=0)
    clean = world.drivers.requests("post_backup")[-1]
    assert clean.options["KEEP_CHECKPOINT"] == checkpoint_name(installation, done.result["backup_id"])


def test_a_failed_backup_after_a_merge_keeps_the_checkpoint_of_the_newest(
    world: World, chain: list[str]
) -> None:
    flatten(world, 3, 4)
    world.drivers.script["backup"] = [NoSpace("full")]
    world.run("backup", vm_id=0)
    clean = world.drivers.requests("post_backup")[-1]
    assert clean.options["KEEP_CHECKPOINT"] == checkpoint_name(world.services.store.installation, chain[-1])


@pytest.mark.fault("concurrency", "flatten beside a backup")
def test_a_backup_made_during_the_merge_is_in_the_chain_afterwards(world: World, chain: list[str]) -> None:
    during: list[Operation] = []
    world.drivers.script["increment_flatten"] = [lambda _request: during.append(backup_beside(world))]
    done = flatten(world, 0, 1, 2, 3, 4)
    assert done.state is OperationState.DONE, done.error
    assert [entry[0] for entry in sources(world)] == [4, 5]
    assert sources(world)[1][1:3] == (4, during[0].result["backup_id"])
    assert world.services.vm(0).config.last_increment_id == 5
    assert world.run("backup", vm_id=0).result["increment_id"] == 6


def backup_beside(world: World) -> Operation:
    """A backup while another operation runs."""
    journal = world.services.store.journal
    queued = journal.enqueue("backup", "beside", {"vm_id": 0}, vm_id=0)
    operation = journal.claim(lambda entry: entry.id == queued.id)
    assert operation is not None
    run_operation(KINDS["backup"], Context(world.services, operation))
    return journal.get(queued.id)


def test_a_merge_that_switches_between_plan_and_prepare_of_a_backup(world: World, chain: list[str]) -> None:
    def merge_beside(_request: Request) -> None:
        journal = world.services.store.journal
        arguments = {"vm_id": 0, "image_id": 0, "increment_ids": [3, 4]}
        queued = journal.enqueue("flatten", "beside", arguments, vm_id=0, image_id=0)
        operation = journal.claim(lambda entry: entry.id == queued.id)
        assert operation is not None
        assert run_operation(KINDS["flatten"], Context(world.services, operation)) is OperationState.DONE

    world.drivers.script["dump_xml"] = [merge_beside]
    done = world.run("backup", vm_id=0)
    assert (done.result["type"], done.result["increment_id"]) == ("INCREMENT", 5)
    prepare = world.drivers.requests("pre_backup")[-1]
    assert prepare.parent is not None
    assert prepare.parent.checkpoint == checkpoint_name(world.services.store.installation, chain[-1])


def test_the_vm_says_that_it_is_being_flattened(world: World, chain: list[str]) -> None:
    seen: list[bool] = []
    world.drivers.script["increment_flatten"] = [
        lambda _request: seen.append(world.services.vm(0).config.active_flatten)
    ]
    flatten(world, 0, 1)
    assert seen == [True]
    assert world.services.vm(0).config.active_flatten is False


def test_a_merge_that_fails_is_undone(world: World, chain: list[str]) -> None:
    before = xmldoc.serialize(world.services.image(0).element)
    world.drivers.script["increment_flatten"] = [NoSpace("full")]
    failed = flatten(world, 0, 1)
    assert failed.state is OperationState.FAILED
    assert json.loads(failed.error)["code"] == "NoSpace"
    assert world.drivers.actions[-3:] == ["increment_flatten", "backup_cancel", "rm"]
    new = world.drivers.requests("increment_flatten")[0].backup
    assert new is not None
    assert world.drivers.requests("rm")[0].options == {"BACKUP_IDS": new.id}
    assert world.drivers.requests("backup_cancel")[0].backup == new
    assert xmldoc.serialize(world.services.image(0).element) == before
    assert world.services.vm(0).config.active_flatten is False


@pytest.mark.fault("data", "damage while a merge runs")
def test_damage_is_entered_and_nothing_is_merged(world: World, chain: list[str]) -> None:
    def damaged(request: Request) -> dict[str, str]:
        name = request.options["BACKUP_IDS"]
        found = (("disk.0.1", "checksum"),) if name == chain[1] else ()
        return {"REPORT": xmldoc.serialize(VerifyReport((VerifiedBackup(name, 1, found),)).to_xml())}

    world.drivers.answers["verify"] = damaged
    world.drivers.script["increment_flatten"] = [DataCorrupt("disk 0: cluster 3")]
    failed = flatten(world, 0, 1, 2)
    assert json.loads(failed.error)["code"] == "DataCorrupt"
    states = [row.state for row in world.services.store.backups(image_id=0)]
    assert states == [BackupState.GOOD, *[BackupState.BROKEN] * 4]
    assert not world.services.vm(0).config.has_chain
    assert len(world.services.image(0).increments) == 5
    refused = flatten(world, 0, 1, 2)
    assert "damaged" in json.loads(refused.error)["message"]
    assert world.drivers.actions.count("increment_flatten") == 1


def test_a_merge_that_cannot_be_proved_marks_its_newest(world: World, chain: list[str]) -> None:
    world.drivers.script["increment_flatten"] = [DataCorrupt("disk 0")]
    world.drivers.script["verify"] = [Unavailable("gone")] * 9
    flatten(world, 0, 1)
    states = [row.state for row in world.services.store.backups(image_id=0)]
    assert states == [BackupState.GOOD, *[BackupState.BROKEN] * 4]


def test_there_must_be_room_beside_the_old_chain(world: World, chain: list[str]) -> None:
    world.services.measured_at.clear()
    world.drivers.answers["monitor"] = lambda _: {"TOTAL_MB": "100", "USED_MB": "91", "FREE_MB": "9"}
    failed = flatten(world, 0, 1)
    assert json.loads(failed.error)["message"].endswith("up to 10 MB for a while, 9 MB free")
    assert "increment_flatten" not in world.drivers.actions


def test_a_pin_set_during_the_merge_holds(world: World, chain: list[str]) -> None:
    world.drivers.script["increment_flatten"] = [
        lambda _request: world.services.store.change(
            "image", 0, lambda element: with_pin(Image(element), 1, pin=True).element
        )
    ]
    failed = flatten(world, 0, 1, 2)
    assert "increment 1 of image 0 is pinned" in json.loads(failed.error)["message"]
    assert world.drivers.cleaning()[-2:] == ["backup_cancel", "rm"]
    assert pinned(world.services.image(0)) == (1,)
    assert len(world.services.image(0).increments) == 5


def test_a_driver_that_tells_no_manifest(world: World, chain: list[str]) -> None:
    world.drivers.answers["increment_flatten"] = lambda request: {
        name: text for name, text in merged(world)(request).items() if name != "MANIFEST"
    }
    newest = world.services.store.backup(chain[2])
    later = {**parse_manifest(newest.manifest).raw, "chain_id": "named-after-a-merge"}
    with world.services.store.transaction() as tx:
        tx.forget_backup(chain[2])
        tx.add_backup(replace(newest, manifest=dump_manifest(later).decode()))
    done = flatten(world, 1, 2)
    manifest = parse_manifest(world.services.store.backup(done.result["backup_id"]).manifest)
    assert (manifest.increment_id, manifest.parent_id, manifest.chain_id) == (2, chain[0], chain[0])
    assert (manifest.replaces, manifest.stands_for) == ((chain[1], chain[2]), (chain[2],))
    assert manifest.disks[0].parent_id == chain[0]


@pytest.mark.fault("concurrency", "cancel of a merge")
def test_cancelling_a_merge_leaves_the_chain(world: World, chain: list[str]) -> None:
    cancellation = Cancellation()

    def cancel(_request: Request) -> None:
        cancellation.cancel()
        raise Cancelled("increment_flatten")

    world.drivers.script["increment_flatten"] = [cancel]
    ended = flatten(world, 0, 1, cancellation=cancellation)
    assert ended.state is OperationState.CANCELLED
    assert [entry[2] for entry in sources(world)] == chain
    assert world.drivers.cleaning()[-2:] == ["backup_cancel", "rm"]


def test_killed_in_the_merge_it_is_undone_and_queued_again(world: World, chain: list[str]) -> None:
    killed_in(world, "increment_flatten", "flatten", vm_id=0, image_id=0, increment_ids=[0, 1])
    assert world.services.vm(0).config.active_flatten is True
    (ended,) = recover(world.services)
    assert ended.state is OperationState.FAILED
    assert world.drivers.actions == ["backup_cancel", "rm"]
    assert world.services.vm(0).config.active_flatten is False
    assert [entry[2] for entry in sources(world)] == chain
    world.run_queued()
    assert [entry[0] for entry in sources(world)] == [1, 2, 3, 4]


def test_killed_after_the_switch_it_goes_forward(
    world: World, chain: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = world.services.store.journal
    journal.enqueue("flatten", "vm:0", {"vm_id": 0, "image_id": 0, "increment_ids": [0, 1]}, vm_id=0)
    operation = journal.claim()
    assert operation is not None

    def die(*_: Any) -> None:
        raise Died

    context = Context(world.services, operation)
    with pytest.raises(Died):
        run_operation(replace(KINDS["flatten"], ended=die), context)
    world.drivers.calls.clear()
    (ended,) = recover(world.services)
    assert ended.state is OperationState.DONE
    assert world.drivers.actions == []
    assert world.services.vm(0).config.active_flatten is False
    world.run_queued()
    assert world.drivers.actions == ["rm"]
    assert world.services.store.journal.list(kind="remove", limit=1)[0].state is OperationState.DONE


def test_a_backup_whose_chain_is_found_damaged_meanwhile_begins_a_new_one(
    world: World, chain: list[str]
) -> None:
    def damage(_request: Request) -> None:
        with world.services.store.transaction() as tx:
            mark_broken(tx, 0, {chain[2]: "disk.0.2: checksum"})

    world.drivers.script["backup"] = [damage]
    done = world.run("backup", vm_id=0)
    assert (done.state, done.result["attempts"]) == (OperationState.DONE, 2)
    assert (done.result["type"], done.result["image_id"]) == ("FULL", 1)
    first, second = (request.backup for request in world.drivers.requests("backup")[-2:])
    assert first is not None
    assert second is not None
    assert world.drivers.requests("rm")[-1].options == {"BACKUP_IDS": first.id}
    good = [row.backup_id for row in world.services.store.backups(state=BackupState.GOOD)]
    assert good == [*chain[:2], second.id]


@pytest.mark.parametrize("kind", ["backup", "flatten"])
@pytest.mark.fault("store", "unreachable at delete")
def test_what_cannot_be_discarded_is_removed_with_what_else_is_to_go(
    world: World, chain: list[str], kind: str
) -> None:
    world.drivers.script["rm"] = [Unavailable("no route to host")] * 3
    world.drivers.script["backup" if kind == "backup" else "increment_flatten"] = [NoSpace("full")]
    failed = world.run("backup", vm_id=0) if kind == "backup" else flatten(world, 0, 1)
    assert failed.state is OperationState.FAILED
    left = world.drivers.requests("rm")[-1].options["BACKUP_IDS"]
    assert to_remove(world.services.image(0)) == (left,)
    flatten(world, 3, 4)
    world.run_queued()
    assert world.drivers.requests("rm")[-1].options["BACKUP_IDS"] == f"{left},{chain[3]},{chain[4]}"
    assert to_remove(world.services.image(0)) == ()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_to_be_kept_since_is_not_merged(world: World, chain: list[str], when: str) -> None:
    def keep_more(_request: Request | None = None) -> None:
        configure_vm(world.services, 0, {"KEEP_LAST": "4"})

    configure_vm(world.services, 0, {"KEEP_LAST": "2"})
    world.run("retention", vm_id=0)
    if when == "before":
        keep_more()
    else:
        world.drivers.script["increment_flatten"] = [keep_more]
    world.run_queued()
    assert [entry[0] for entry in sources(world)] == [0, 1, 2, 3, 4]
    failed = world.services.store.journal.list(kind="flatten", limit=1)[0]
    assert "is to be kept" in json.loads(failed.error)["message"]
    world.run("retention", vm_id=0)
    world.run_queued()
    assert [entry[0] for entry in sources(world)] == [1, 2, 3, 4]


def test_a_full_backup_that_cannot_be_discarded_is_removed_with_the_image_beside_it(world: World) -> None:
    configure_vm(world.services, 0, {"MODE": "FULL", "KEEP_LAST": "1"})
    first = world.run("backup", vm_id=0)
    world.drivers.script["rm"] = [Unavailable("no route to host")] * 3
    world.drivers.script["backup"] = [NoSpace("full")]
    assert world.run("backup", vm_id=0).state is OperationState.FAILED
    left = world.drivers.requests("rm")[-1].options["BACKUP_IDS"]
    assert world.run("backup", vm_id=0).state is OperationState.DONE
    world.run_queued()
    removed = {
        name for call in world.drivers.requests("rm")[3:] for name in call.options["BACKUP_IDS"].split(",")
    }
    assert removed == {left, first.result["backup_id"]}
