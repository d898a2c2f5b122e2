"""Backup as a sequence: what is called, in which order, with what, and what the catalogue says after."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oned_backup import xmldoc
from oned_backup.contract.documents import Listing
from oned_backup.contract.request import Outcome, Request
from oned_backup.errors import (
    Busy,
    DriverFailed,
    Misconfigured,
    NoSpace,
    NotFound,
    OnedBackupError,
    Unavailable,
)
from oned_backup.model.manifest import parse_manifest
from oned_backup.model.names import checkpoint_name
from oned_backup.model.vm import DomainState
from oned_backup.operations.inventory import configure_vm
from oned_backup.runner.run import Cancellation
from oned_backup.store import BackupState, Operation, OperationState

from .conftest import World


def error_of(operation: Operation) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(operation.error)
    return found


def kept(world: World) -> list[tuple[str, str]]:
    """(outcome, checkpoint kept) of every CLEAN."""
    return [
        (str(request.outcome), request.options["KEEP_CHECKPOINT"])
        for request in world.drivers.requests("post_backup")
    ]


def checkpoint(world: World, operation: Operation) -> str:
    return checkpoint_name(world.services.store.installation, operation.result["backup_id"])


def test_first_backup_begins_a_chain(world: World) -> None:
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE, done.error
    actions = world.drivers.actions
    assert sorted(actions[:2]) == ["dump_xml", "monitor"]  # side by side
    assert actions[2:] == ["pre_backup_live", "backup", "post_backup_live"]
    assert world.step_names(done) == [
        f"{name} DONE" for name in ("PLAN", "PREPARE", "STORE", "RECORD", "CLEAN")
    ]
    (prepare,) = world.drivers.requests("pre_backup")
    assert prepare.options["FULL_REASON"] == "first-backup"
    assert prepare.parent is None
    vm, image = world.services.vm(0), world.services.image(0)
    assert vm.config.incremental_backup_id == 0
    assert vm.config.last_increment_id == 0
    assert vm.backup_ids == (0,)
    assert vm.state_name == "RUNNING"
    assert [entry.source for entry in image.increments] == [done.result["backup_id"]]
    assert world.services.datastore(100).image_ids == (0,)
    assert kept(world) == [("SUCCESS", checkpoint(world, done))]


def test_a_driver_is_told_that_the_id_is_new_and_no_attempt_has_the_id_of_another(world: World) -> None:
    world.drivers.script["backup"] = [Unavailable("away"), None]
    done = world.run("backup", vm_id=0)
    requests = world.drivers.requests("backup")
    assert done.result["attempts"] == len({request.backup.id for request in requests if request.backup}) == 2
    assert [request.options["NEW_ID"] for request in requests] == ["YES", "YES"]


def test_the_vm_is_in_backup_state_meanwhile(world: World) -> None:
    seen = []
    world.drivers.script["backup"] = [lambda _request: seen.append(world.services.vm(0).state_name)]
    world.run("backup", vm_id=0)
    assert seen == ["BACKUP"]
    assert world.services.vm(0).state_name == "RUNNING"


def test_second_backup_continues_the_chain(world: World) -> None:
    first = world.run("backup", vm_id=0)
    second = world.run("backup", vm_id=0)
    _, prepare = world.drivers.requests("pre_backup")
    assert prepare.backup is not None
    assert prepare.backup.parent_id == first.result["backup_id"]
    assert prepare.backup.chain_id == first.result["backup_id"]
    assert prepare.backup.increment_id == 1
    assert prepare.parent is not None
    assert prepare.parent.checkpoint == checkpoint(world, first)
    assert prepare.parent.disks[0].source == "/srv/web.qcow2"
    assert second.result["increment_id"] == 1
    assert [entry.id for entry in world.services.image(0).increments] == [0, 1]
    assert kept(world)[-1] == ("SUCCESS", checkpoint(world, second))


def test_all_disks_full_begins_a_new_chain_with_the_reason(world: World) -> None:
    world.run("backup", vm_id=0)
    world.drivers.full_anyway = True
    done = world.run("backup", vm_id=0)
    assert done.result["image_id"] == 1
    assert done.result["increment_id"] == 0
    stored = world.drivers.requests("backup")[-1].backup
    assert stored is not None
    assert stored.chain_id == stored.id
    assert stored.parent_id == ""
    assert "bitmap-missing" in done.result["notes"][0]
    assert world.services.vm(0).config.incremental_backup_id == 1


def test_mode_full_makes_an_image_each_and_no_checkpoint(world: World) -> None:
    configure_vm(world.services, 0, {"MODE": "FULL"})
    world.run("backup", vm_id=0)
    world.run("backup", vm_id=0)
    assert world.services.vm(0).backup_ids == (0, 1)
    assert world.services.image(0).increments == ()
    assert kept(world) == [("SUCCESS", ""), ("SUCCESS", "")]


def test_keep_last_removes_the_oldest_full_backups(world: World) -> None:
    configure_vm(world.services, 0, {"MODE": "FULL", "KEEP_LAST": "2"})
    for _ in range(3):
        world.run("backup", vm_id=0)
        world.run_queued()
    assert world.services.vm(0).backup_ids == (1, 2)
    assert world.services.datastore(100).image_ids == (1, 2)
    assert world.services.store.backups(image_id=0) == []


@pytest.mark.parametrize("action", ["pre_backup_live", "backup"])
@pytest.mark.parametrize("error", [DriverFailed("broken"), NoSpace("full")])
def test_failure_cleans_up_and_keeps_the_parents_checkpoint(
    world: World, action: str, error: OnedBackupError
) -> None:
    first = world.run("backup", vm_id=0)
    world.drivers.script[action] = [error]
    failed = world.run("backup", vm_id=0)
    assert failed.state is OperationState.FAILED
    assert error_of(failed)["code"] == type(error).__name__
    assert kept(world)[-1] == ("FAILURE", checkpoint(world, first))
    assert world.drivers.cleaning().count("post_backup_live") == 2
    vm = world.services.vm(0)
    assert vm.state_name == "RUNNING"
    assert error.message in vm.error
    assert vm.config.last_increment_id == 0
    again = world.run("backup", vm_id=0)
    assert again.result["increment_id"] == 1
    assert world.services.vm(0).error == ""


def test_a_failed_store_cleans_before_it_discards(world: World) -> None:
    world.drivers.script["backup"] = [DriverFailed("broken")]
    failed = world.run("backup", vm_id=0)
    assert world.drivers.cleaning() == ["post_backup_live", "backup_cancel", "rm"]
    assert world.step_names(failed) == [
        "PLAN DONE",
        "PREPARE UNDONE",
        "STORE UNDONE",
        "CLEAN DONE",
        "DISCARD DONE",
    ]


def test_a_prepare_that_died_thaws_the_guest_first(world: World) -> None:
    world.drivers.script["pre_backup_live"] = [DriverFailed("killed")]
    world.run("backup", vm_id=0)
    assert world.drivers.cleaning() == ["thaw", "abort_backup", "post_backup_live"]


def test_cleaning_goes_on_if_the_store_is_gone(world: World) -> None:
    world.drivers.script["backup"] = [NoSpace("full")]
    world.drivers.script["backup_cancel"] = [DriverFailed("gone")] * 3
    failed = world.run("backup", vm_id=0)
    assert kept(world) == [("FAILURE", "")]
    assert "DISCARD" in failed.result["notes"][0]


def test_a_clean_after_record_whose_driver_dies_is_done_again(world: World) -> None:
    world.drivers.script["post_backup_live"] = [DriverFailed("post_backup_live: killed by SIGKILL"), None]
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE
    assert "notes" not in done.result
    assert len(world.drivers.requests("post_backup")) == 2


@pytest.mark.fault("host", "hypervisor unreachable at the clean-up")
def test_a_failed_clean_after_record_is_a_warning(world: World) -> None:
    world.drivers.script["post_backup_live"] = [DriverFailed("libvirtd died")] * 3
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE
    assert "libvirtd died" in done.result["notes"][0]
    assert world.services.vm(0).backup_ids == (0,)


@pytest.mark.fault("guest", "stopped between plan and freeze")
def test_a_domain_that_changes_its_state_is_planned_again(world: World) -> None:
    def stops(_request: Request) -> None:
        world.drivers.state = DomainState.OFF
        raise Busy("the domain is off")

    world.drivers.script["pre_backup_live"] = [stops]
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE, done.error
    assert done.result["live"] is False
    assert "post_backup_live" in world.drivers.actions
    assert world.drivers.actions[-1] == "post_backup"
    ids = {request.backup.id for request in world.drivers.requests("pre_backup") if request.backup}
    assert len(ids) == 2


def test_planning_again_has_an_end(world: World) -> None:
    world.drivers.script["pre_backup_live"] = [Busy("changing")] * 9
    failed = world.run("backup", vm_id=0)
    assert error_of(failed)["code"] == "Busy"
    assert world.drivers.actions.count("pre_backup_live") == 4
    assert world.drivers.actions.count("post_backup_live") == 4


def test_a_guest_that_stops_while_storing_is_backed_up_off_once(world: World) -> None:
    def stops(_request: Request) -> None:
        world.drivers.state = DomainState.OFF
        raise DriverFailed("connection closed")

    world.drivers.script["backup"] = [stops, DriverFailed("again")]
    failed = world.run("backup", vm_id=0)
    assert failed.state is OperationState.FAILED
    assert [action for action in world.drivers.actions if "re_backup" in action] == [
        "pre_backup_live",
        "pre_backup",
    ]
    assert world.services.vm(0).state_name == "POWEROFF"


@pytest.mark.fault("host", "hypervisor unreachable at the start")
def test_what_may_pass_is_tried_again_until_the_limit(world: World) -> None:
    world.drivers.script["dump_xml"] = [Unavailable("no libvirtd"), Unavailable("no libvirtd")]
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE
    assert done.result["attempts"] == 3
    world.drivers.script["dump_xml"] = [Unavailable("no libvirtd")] * 1000
    assert error_of(world.run("backup", vm_id=0))["code"] == "Unavailable"


@pytest.mark.fault("store", "wrong password")
def test_a_datastore_that_refuses_us_is_disabled(world: World) -> None:
    world.drivers.script["backup"] = [Misconfigured("wrong password")]
    world.run("backup", vm_id=0)
    assert not world.services.datastore(100).is_enabled
    refused = world.run("backup", vm_id=0, datastore_id=100)
    assert error_of(refused)["code"] == "Misconfigured"
    assert "wrong password" in error_of(refused)["message"]
    assert world.drivers.actions.count("pre_backup_live") == 1


@pytest.mark.fault("store", "full at the start")
def test_no_room_is_found_before_the_guest_is_touched(world: World) -> None:
    world.run("backup", vm_id=0)
    full = {"TOTAL_MB": "10", "USED_MB": "10", "FREE_MB": "2"}
    world.drivers.answers["monitor"] = lambda _request: full
    world.services.measured_at.clear()  # as if it were some minutes later
    failed = world.run("backup", vm_id=0, reset=True)
    assert error_of(failed)["code"] == "NoSpace"
    assert "5 MB needed, 2 MB free" in error_of(failed)["message"]
    assert world.drivers.actions.count("pre_backup_live") == 1


@pytest.mark.parametrize("action", ["dump_xml", "monitor", "pre_backup_live", "backup"])
@pytest.mark.fault("concurrency", "cancel at each step of a backup")
def test_cancelled_at_any_step_leaves_nothing(world: World, action: str) -> None:
    first = world.run("backup", vm_id=0)
    world.services.measured_at.clear()
    cancellation = Cancellation()
    world.drivers.script[action] = [lambda _request: cancellation.cancel()]
    ended = world.run("backup", vm_id=0, cancellation=cancellation)
    assert ended.state is OperationState.CANCELLED
    assert error_of(ended)["exit_code"] == 3
    assert world.services.vm(0).state_name == "RUNNING"
    assert world.services.vm(0).error == ""
    assert len(world.services.store.backups()) == 1
    if "pre_backup_live" in world.drivers.actions[5:]:
        assert kept(world)[-1] == (str(Outcome.CANCELLED), checkpoint(world, first))


@pytest.mark.fault("concurrency", "cancel at each step of a backup")
def test_a_cancel_after_record_comes_too_late(world: World) -> None:
    cancellation = Cancellation()
    world.drivers.script["post_backup_live"] = [lambda _request: cancellation.cancel()]
    assert world.run("backup", vm_id=0, cancellation=cancellation).state is OperationState.DONE


def test_faults_of_our_own_are_undone_too(world: World) -> None:
    def fault(_request: Request) -> None:
        raise ZeroDivisionError("oops")

    world.drivers.script["backup"] = [fault]
    failed = world.run("backup", vm_id=0)
    assert "ZeroDivisionError" in error_of(failed)["message"]
    assert kept(world) == [("FAILURE", "")]


def test_driver_that_tells_no_manifest_gets_increments_too(world: World) -> None:
    def without_manifest(request: Request) -> dict[str, str]:
        assert request.backup is not None
        return {"BACKUP_ID": request.backup.id, "SIZE_MB": "5", "FORMAT": "raw"}

    world.drivers.answers["backup"] = without_manifest
    first, second = world.run("backup", vm_id=0), world.run("backup", vm_id=0)
    assert second.state is OperationState.DONE, second.error
    assert second.result["type"] == "INCREMENT"
    manifests = [parse_manifest(row.manifest) for row in world.services.store.backups(vm_id=0)]
    assert [manifest.id for manifest in manifests] == [first.result["backup_id"], second.result["backup_id"]]
    assert manifests[1].disks[0].parent_id == first.result["backup_id"]


@pytest.mark.parametrize("manifest", ["no manifest", "{}"])
@pytest.mark.fault("driver", "answers nonsense where a document is due")
def test_manifest_that_breaks_the_contract_fails_the_backup(world: World, manifest: str) -> None:
    def broken(request: Request) -> dict[str, str]:
        assert request.backup is not None
        return {"BACKUP_ID": request.backup.id, "SIZE_MB": "5", "FORMAT": "raw", "MANIFEST": manifest}

    world.drivers.answers["backup"] = broken
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.FAILED
    assert "DriverBug" in str(done.error)
    assert not world.services.store.backups(vm_id=0)


@pytest.mark.fault("daemon", "disk of the catalogue full")
def test_a_journal_that_cannot_be_written_does_not_stop_the_cleaning(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = world.services.store.journal
    begin_step = journal.begin_step

    def full(operation_id: str, name: str, data: dict[str, Any] | None = None) -> int:
        if name in {"RECORD", "DISCARD", "CLEAN"}:
            raise NoSpace("database: disk full")
        return begin_step(operation_id, name, data)

    monkeypatch.setattr(journal, "begin_step", full)
    failed = world.run("backup", vm_id=0)
    assert error_of(failed)["code"] == "NoSpace"
    assert world.drivers.cleaning() == ["post_backup_live", "backup_cancel", "rm"]


def listing(_request: Request) -> dict[str, str]:
    """Of a restore point whose driver finds it."""
    return {"LISTING": xmldoc.serialize(Listing(()).to_xml())}


def test_what_a_store_turns_out_to_lack_is_not_continued(world: World) -> None:
    points = [str(world.run("backup", vm_id=0).result["backup_id"]) for _ in range(4)]
    world.drivers.script["backup"] = [NotFound(f"{points[3]} is absent")]
    world.drivers.script["ls"] = [None, None, NotFound("absent"), NotFound("absent")]
    world.drivers.answers["ls"] = listing
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE, done.error
    assert (done.result["type"], done.result["image_id"]) == ("FULL", 1)
    assert any(f"marked as BROKEN: {points[2]}, {points[3]}" in note for note in done.result["notes"])
    states = [row.state for row in world.services.store.backups(image_id=0)]
    assert states == [BackupState.GOOD] * 2 + [BackupState.BROKEN] * 2


def test_a_store_that_only_says_so_convicts_nothing(world: World) -> None:
    world.run("backup", vm_id=0)
    world.drivers.answers["ls"] = listing
    world.drivers.script["backup"] = [NotFound("absent")]
    assert world.run("backup", vm_id=0).state is OperationState.FAILED
    assert {row.state for row in world.services.store.backups()} == {BackupState.GOOD}
    assert world.run("backup", vm_id=0).result["type"] == "INCREMENT"
