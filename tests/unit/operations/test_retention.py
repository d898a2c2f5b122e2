"""Retention as operations: what is queued, what goes, and which operations may run side by side."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from oned_backup.contract.exports import Reason
from oned_backup.contract.request import Request
from oned_backup.errors import Conflict
from oned_backup.model.image import Image, ImageState
from oned_backup.model.pruning import to_remove, with_pin, with_to_remove
from oned_backup.operations import retention
from oned_backup.operations.context import Context
from oned_backup.operations.delete import cut_off, mark_image
from oned_backup.operations.engine import run_operation
from oned_backup.operations.exclusion import must_wait_for, removal_lock, retention_lock, vm_lock
from oned_backup.operations.inventory import configure_vm
from oned_backup.operations.kinds import KINDS
from oned_backup.store import Operation, OperationState

from .conftest import World
from .test_flatten import merged
from .test_import import imported, manifest

DAY = 86_400


@pytest.fixture
def calendar(world: World) -> World:
    """A world whose driver can merge and whose clock the tests move, from a Monday noon on."""
    world.drivers.answers["increment_flatten"] = merged(world)
    now = [1_772_452_800.0]
    world.services = replace(world.services, clock=lambda: now[0])
    world.now = now  # type: ignore[attr-defined]
    return world


def backups(world: World, days: int, **arguments: Any) -> None:
    """A backup each day, with the retention that follows it."""
    now: list[float] = world.now  # type: ignore[attr-defined]
    for _ in range(days):
        now[0] += DAY
        done = world.run("backup", vm_id=0, **arguments)
        assert done.state is OperationState.DONE, done.error
        world.run_queued()


def points(world: World) -> list[tuple[int, int]]:
    return [(row.image_id, row.increment_id) for row in world.services.store.backups(vm_id=0)]


def test_a_week_with_keep_last(calendar: World) -> None:
    configure_vm(calendar.services, 0, {"KEEP_LAST": "3"})
    backups(calendar, 7)
    assert points(calendar) == [(0, 4), (0, 5), (0, 6)]
    assert calendar.services.vm(0).config.last_increment_id == 6
    assert len(calendar.drivers.requests("rm")) == 4
    assert to_remove(calendar.services.image(0)) == ()


def test_a_month_with_daily_weekly_and_monthly(calendar: World) -> None:
    configure_vm(calendar.services, 0, {"KEEP_DAILY": "3", "KEEP_WEEKLY": "2", "KEEP_MONTHLY": "2"})
    backups(calendar, 30)
    with calendar.services.store.transaction() as tx:
        plan = retention.look(calendar.services, tx, 0)
    assert not plan
    assert [verdict.point.increment_id for verdict in plan.verdicts] == [26, 27, 28, 29]  # 28 is 31 March
    assert calendar.run("backup", vm_id=0).result["type"] == "INCREMENT"


def test_without_settings_nothing_is_queued(calendar: World) -> None:
    backups(calendar, 2)
    assert calendar.services.store.journal.list(kind="retention") == []


def test_chain_length_begins_a_new_chain_with_its_own_reason(calendar: World) -> None:
    configure_vm(calendar.services, 0, {"KEEP_LAST": "2", "CHAIN_LENGTH": "4"})
    backups(calendar, 4)
    assert points(calendar) == [(0, 2), (0, 3)]  # merged ones count for the length as well
    backups(calendar, 1)
    assert points(calendar) == [(0, 3), (1, 0)]
    assert calendar.drivers.requests("pre_backup")[-1].options["FULL_REASON"] == Reason.CHAIN_LENGTH
    backups(calendar, 1)
    assert points(calendar) == [(1, 0), (1, 1)]
    assert calendar.services.vm(0).backup_ids == (1,)
    assert calendar.services.datastore(100).image_ids == (1,)


def test_a_driver_that_cannot_merge_is_not_asked_to(calendar: World, monkeypatch: pytest.MonkeyPatch) -> None:
    configure_vm(calendar.services, 0, {"KEEP_LAST": "1"})
    monkeypatch.setattr(retention, "_can_merge", lambda *_: False)
    backups(calendar, 3)
    assert points(calendar) == [(0, 0), (0, 1), (0, 2)]
    assert calendar.services.store.journal.list(kind="flatten") == []


def test_a_second_look_waits_for_the_first_ones_merges(calendar: World) -> None:
    backups(calendar, 4)
    configure_vm(calendar.services, 0, {"KEEP_LAST": "2"})
    first = calendar.run("retention", vm_id=0)
    second = calendar.run("retention", vm_id=0)
    assert second.result["queued"] == first.result["queued"]
    journal = calendar.services.store.journal
    assert [entry.kind for entry in journal.list(state=OperationState.QUEUED)] == ["retention", "flatten"]
    calendar.run_queued()
    assert points(calendar) == [(0, 2), (0, 3)]
    assert {entry.state for entry in journal.list()} == {OperationState.DONE}


def test_the_result_says_of_each_point_why(calendar: World) -> None:
    backups(calendar, 3)
    configure_vm(calendar.services, 0, {"KEEP_LAST": "1"})
    done = calendar.run("retention", vm_id=0)
    told = [(entry["increment_id"], entry["fate"], entry["into"]) for entry in done.result["points"]]
    assert told == [(0, "MERGED", 2), (1, "MERGED", 2), (2, "KEPT", None)]
    assert done.result["points"][2]["reasons"][0] == "newest good one"


def test_a_pinned_image_is_not_deleted(calendar: World) -> None:
    backups(calendar, 1)
    calendar.services.store.change("image", 0, lambda element: with_pin(Image(element), 0, pin=True).element)
    refused = calendar.run("delete", image_id=0, vm_id=0)
    assert "pinned" in json.loads(refused.error)["message"]
    assert calendar.services.image(0).is_ready


def test_cutting_off_the_newest_ends_the_active_chain(calendar: World) -> None:
    backups(calendar, 3)
    newest = calendar.services.image(0).increments[-1].source
    done = calendar.run("cut", vm_id=0, image_id=0, increment_ids=[2])
    assert "the next backup of its VM is a full one" in done.result["notes"][0]
    calendar.run_queued()
    assert points(calendar) == [(0, 0), (0, 1)]
    assert calendar.drivers.requests("rm")[-1].options["BACKUP_IDS"] == newest
    backups(calendar, 1)
    assert points(calendar)[-1] == (1, 0)


def test_an_image_that_could_not_be_removed_is_removed_by_the_next_retention(calendar: World) -> None:
    configure_vm(calendar.services, 0, {"KEEP_LAST": "1"})
    backups(calendar, 1)
    calendar.drivers.script["rm"] = [Conflict("not now")]
    backups(calendar, 1, reset=True)
    assert calendar.services.image(0).state == ImageState.DELETE
    backups(calendar, 1)
    assert [Image(entry.element).id for entry in calendar.services.store.find("image")] == [1]


def test_a_datastore_that_is_gone_does_not_keep_another_one_full(calendar: World) -> None:
    other = calendar.add_datastore()
    configure_vm(calendar.services, 0, {"KEEP_LAST": "1", "MODE": "FULL"})
    backups(calendar, 1, datastore_id=100)

    def gone(request: Request) -> dict[str, str]:
        if request.datastore is not None and request.datastore.findtext("ID") == "100":
            raise Conflict("not now")
        return {}

    calendar.drivers.answers["rm"] = gone
    for datastore_id in (100, other, other):
        backups(calendar, 1, datastore_id=datastore_id)
    images = [Image(entry.element) for entry in calendar.services.store.find("image")]
    assert [(image.id, image.datastore_id, image.is_ready) for image in images] == [
        (0, 100, False),
        (1, 100, True),
        (3, other, True),
    ]


def test_what_is_noted_while_an_image_is_removed_is_not_forgotten(calendar: World) -> None:
    backups(calendar, 1)

    def noted(_request: Request) -> None:
        calendar.services.store.change(
            "image", 0, lambda element: with_to_remove(Image(element), ["left"]).element
        )

    calendar.drivers.script["rm"] = [noted]
    calendar.run("delete", vm_id=0, image_id=0)
    assert to_remove(calendar.services.image(0)) == ("left",)
    calendar.run("delete", vm_id=0, image_id=0)
    assert "left" in calendar.drivers.requests("rm")[-1].options["BACKUP_IDS"]
    assert calendar.services.store.find("image") == []


def test_what_cannot_be_merged_where_it_lies_is_kept_and_said(calendar: World) -> None:
    chain = [manifest("job_3.00000000", 0, chain_id="job_3.00000000")]
    chain += [
        manifest(f"job_3.0000000{n}", n, f"job_3.0000000{n - 1}", chain_id="job_3.00000000") for n in (1, 2)
    ]
    imported(calendar, *chain)
    configure_vm(calendar.services, 0, {"KEEP_LAST": "2"})
    backups(calendar, 1)
    assert points(calendar) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    with calendar.services.store.transaction() as tx:
        told = [verdict.reasons for verdict in retention.look(calendar.services, tx, 0).verdicts]
    assert told[0] == ("increment 1 continues it: its store cannot merge",)
    backups(calendar, 1)
    assert points(calendar) == [(1, 0), (1, 1)]
    assert calendar.services.store.journal.list(kind="flatten") == []


def test_without_settings_too_the_next_backup_has_removed_what_a_store_could_not(calendar: World) -> None:
    backups(calendar, 3)
    calendar.drivers.script["rm"] = [Conflict("not now")] * 2
    calendar.run("flatten", vm_id=0, image_id=0, increment_ids=[0, 1])
    calendar.run_queued()
    assert len(to_remove(calendar.services.image(0))) == 2
    backups(calendar, 1)
    assert len(to_remove(calendar.services.image(0))) == 2
    backups(calendar, 1)
    assert to_remove(calendar.services.image(0)) == ()
    assert points(calendar) == [(0, 1), (0, 2), (0, 3), (0, 4)]


# --- who waits for whom


def test_removal_waits_for_readers_and_nothing_else_does(world: World) -> None:
    journal = world.services.store.journal
    locks = {
        **dict.fromkeys(("backup", "restore", "verify", "download", "delete", "cut"), vm_lock(0)),
        **dict.fromkeys(("retention", "flatten"), retention_lock(0)),
        "remove": removal_lock(0),
    }
    operations = {kind: journal.enqueue(kind, lock, {}, vm_id=0) for kind, lock in locks.items()}

    def waits(kind: str) -> set[str]:
        asking: Operation = operations[kind]
        return {
            other.kind
            for other in operations.values()
            if other.lock == asking.lock or must_wait_for(asking, [other])
        }

    assert waits("remove") - {"remove"} == {"restore", "verify", "download", "delete"}
    assert waits("flatten") == {"retention", "flatten", "delete", "cut"}
    assert waits("backup") == waits("restore") == {"backup", "restore", "verify", "download", "delete", "cut"}
    assert waits("delete") - waits("backup") == {"retention", "flatten", "remove"}
    assert must_wait_for(operations["remove"], [replace(operations["restore"], vm_id=7)]) is None
    assert must_wait_for(operations["remove"], [replace(operations["download"], vm_id=None)])
    assert set(locks) <= set(KINDS)


def test_a_reader_that_started_before_the_switch_keeps_its_files(calendar: World) -> None:
    backups(calendar, 3)
    journal = calendar.services.store.journal
    arguments = {"vm_id": 0, "image_id": 0, "increment_ids": [0, 1]}
    merging = journal.enqueue("flatten", retention_lock(0), arguments, vm_id=0)
    reading = journal.enqueue("verify", vm_lock(0), {"image_id": 0}, vm_id=0, image_id=0)

    def claim() -> str:
        running = journal.list(state=OperationState.RUNNING)
        found = journal.claim(lambda entry: must_wait_for(entry, running) is None)
        return "" if found is None else found.kind

    assert [claim(), claim(), claim()] == ["flatten", "verify", ""]
    assert run_operation(KINDS["flatten"], Context(calendar.services, merging)) is OperationState.DONE
    assert claim() == ""
    journal.finish(reading.id, OperationState.DONE)
    assert claim() == "remove"


@pytest.mark.fault("odd inputs", "clock that goes backwards")
def test_a_clock_that_was_ahead_does_not_take_the_backup_just_made(calendar: World) -> None:
    now: list[float] = calendar.now  # type: ignore[attr-defined]
    configure_vm(calendar.services, 0, {"MODE": "FULL", "KEEP_LAST": "2"})
    now[0] += 3000 * DAY
    backups(calendar, 2)
    now[0] -= 3000 * DAY
    for image_id in (2, 3):
        backups(calendar, 1)
        assert points(calendar) == [(0, 0), (1, 0), (image_id, 0)]


def test_a_removal_takes_what_was_to_go_when_it_began(calendar: World) -> None:
    store = calendar.services.store
    backups(calendar, 3)
    backups(calendar, 1, reset=True)
    backups(calendar, 2)
    for image_id in (0, 1):
        with store.transaction() as tx:
            cut_off(tx, image_id, [2])

    def meanwhile(_request: Request) -> None:
        with store.transaction() as tx:
            cut_off(tx, 1, [1])
            mark_image(tx, 0)

    calendar.drivers.script["rm"] = [meanwhile]
    second = store.backups(image_id=1)[1].backup_id
    first = [row.backup_id for row in store.backups(image_id=0)]
    assert calendar.run("remove", vm_id=0, image_ids=[0, 1]).state is OperationState.DONE
    assert to_remove(calendar.services.image(1)) == (second,)
    assert [row.backup_id for row in store.backups(image_id=0)] == first
    assert calendar.run("remove", vm_id=0, image_ids=[0, 1]).state is OperationState.DONE
    asked = [set(call.options["BACKUP_IDS"].split(",")) for call in calendar.drivers.requests("rm")]
    assert asked[2:] == [set(first), {second}]
