"""A restore that fails leaves nothing of its own, and touches nothing of others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from oned_backup import xmldoc
from oned_backup.contract.documents import RestorePlan, StoredDisk
from oned_backup.contract.request import Request
from oned_backup.contract.targets import targets_to_xml
from oned_backup.errors import Conflict, DataCorrupt, DriverFailed, NoSpace, Salvaged
from oned_backup.model.vm import DomainState, Vm, sync_domain
from oned_backup.runner.run import Cancellation
from oned_backup.store import BackupState, OperationState
from oned_backup.transfer import restoring

from .conftest import DOMAIN, World


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


@pytest.fixture
def stored(world: World) -> World:
    """The world with one backup, and a store that gives it back."""
    world.run("backup", vm_id=0)

    def plan(_request: Request) -> dict[str, str]:
        disk = StoredDisk(0, "fs://100/-/0:x/0/disk.0", 1024, "disk.0.0")
        files = (("domain.xml", DOMAIN.encode()), ("nvram.fd", b"secret variables"))
        return {"PLAN": xmldoc.serialize(RestorePlan("x", 0, (disk,), files).to_xml())}

    def restore(request: Request) -> dict[str, str]:
        if request.datastore is not None:
            return plan(request)
        restoring.restore(request)
        return {}

    def pre_restore(request: Request) -> dict[str, str]:
        source = world.services.settings.work_dir / request.operation_id / "source"
        return {"TARGETS": xmldoc.serialize(targets_to_xml(restoring.pre_restore(request, source)))}

    def post_restore(request: Request) -> dict[str, str]:
        restoring.post_restore(request)
        return {}

    def download(request: Request) -> dict[str, str]:
        Path(request.options["TARGET"]).write_bytes(b"disk")
        return {}

    world.drivers.answers |= {"restore": restore, "download": download}
    world.drivers.answers |= {"pre_restore": pre_restore, "post_restore": post_restore}
    world.drivers.answers["define"] = lambda _request: {"DEPLOY_ID": "web-restored-1"}
    backup_id = world.services.store.backups()[0].backup_id
    usual = world.drivers.answers["restore"]
    world.drivers.answers["restore"] = lambda request: {
        key: value.replace("<BACKUP_ID>x<", f"<BACKUP_ID>{backup_id}<")
        for key, value in usual(request).items()
    }
    return world


def plan_with_domain(stored: World, domain: str) -> None:
    """Have the store give another domain.xml back, and no other small file."""
    usual = stored.drivers.answers["restore"]

    def restore(request: Request) -> dict[str, str]:
        answer = usual(request)
        if "PLAN" not in answer:
            return answer
        plan = RestorePlan.from_xml(xmldoc.parse(answer["PLAN"]))
        return {"PLAN": xmldoc.serialize(replace(plan, files=(("domain.xml", domain.encode()),)).to_xml())}

    stored.drivers.answers["restore"] = restore


def test_all_that_is_restored_has_its_name(stored: World, tmp_path: Path) -> None:
    target = tmp_path / "deep/er"
    done = stored.run("restore", image_id=0, to=str(target), define_host_id=0)
    assert done.state is OperationState.DONE, done.error
    assert names(target) == ["disk.0.qcow2", "domain.xml", "nvram.fd"]
    assert done.result["deploy_id"] == "web-restored-1"
    (define,) = stored.drivers.requests("define")
    assert str(target / "disk.0.qcow2") in define.options["DOMAIN"]
    assert "web-restored-1" in define.options["DOMAIN"]


def test_a_name_is_taken_only_by_a_domain_of_that_host(stored: World, tmp_path: Path) -> None:
    """The catalogue's own VM of that name, elsewhere or lost, is what is being restored."""
    assert stored.services.vm(0).name == "web"
    done = stored.run("restore", image_id=0, to=str(tmp_path / "out"), define_host_id=0, name="web")
    assert done.state is OperationState.DONE, done.error
    assert "<name>web<" in stored.drivers.requests("define")[0].options["DOMAIN"]
    stored.drivers.answers["monitor"] = lambda _request: monitored("web", "theirs")
    refused = stored.run("restore", image_id=0, to=str(tmp_path / "2"), define_host_id=0, name="web")
    assert "host local has a domain 'web' already" in refused.error


def test_the_copy_of_a_vm_with_a_long_name_gets_one_that_fits(stored: World, tmp_path: Path) -> None:
    domain = DOMAIN.replace("<name>web<", f"<name>{'w' * 200}<")
    plan_with_domain(stored, domain)
    done = stored.run("restore", image_id=0, to=str(tmp_path / "out"), define_host_id=0)
    assert done.state is OperationState.DONE, done.error
    assert done.result["name"] == f"{'w' * 100}-restored-1"


@pytest.mark.parametrize("action", ["pre_restore", "download", "restore", "define"])
def test_a_failure_leaves_nothing(stored: World, tmp_path: Path, action: str) -> None:
    error = DriverFailed("broken")
    # `restore` is the store's plan first, and then the transfer manager's placing
    stored.drivers.script[action] = [None, error] if action == "restore" else [error]
    failed = stored.run("restore", image_id=0, to=str(tmp_path / "deep/er"), define_host_id=0)
    assert failed.state is OperationState.FAILED
    assert not (tmp_path / "deep").exists()


def test_files_of_others_are_left_alone(stored: World, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine").write_text("precious")

    def somebody_else(_request: Request) -> None:
        (target / "domain.xml").write_text("theirs")

    stored.drivers.script["download"] = [somebody_else]
    failed = stored.run("restore", image_id=0, to=str(target))
    assert json.loads(failed.error)["code"] == "Conflict"
    assert names(target) == ["domain.xml", "mine"]
    assert (target / "domain.xml").read_text() == "theirs"


def test_a_domain_that_came_to_be_keeps_its_files(stored: World, tmp_path: Path) -> None:
    def defined_but_killed(request: Request) -> None:
        uuid = xmldoc.text(xmldoc.parse(request.options["DOMAIN"]), "uuid")
        stored.drivers.answers["monitor"] = lambda _request: monitored("web-restored-1", uuid)
        raise DriverFailed("killed")

    stored.drivers.script["define"] = [defined_but_killed]
    failed = stored.run("restore", image_id=0, to=str(tmp_path / "out"), define_host_id=0)
    assert failed.state is OperationState.FAILED
    assert "they are kept" in failed.result["notes"][0]
    assert names(tmp_path / "out") == ["disk.0.qcow2", "domain.xml", "nvram.fd"]


def test_an_address_that_the_original_has_too_is_told(stored: World, tmp_path: Path) -> None:
    nic = "<interface type='network'><mac address='52:54:00:00:00:01'/><source network='lan'/></interface>"
    domain = DOMAIN.replace("</devices>", f"{nic}</devices>")
    plan_with_domain(stored, domain)
    stored.services.store.change(
        "vm",
        0,
        lambda old: sync_domain(Vm(old), xmldoc.parse(domain), DomainState.RUNNING, {}, date=1).element,
    )
    same = stored.run("restore", image_id=0, to=str(tmp_path / "same"), define_host_id=0)
    assert same.state is OperationState.DONE, same.error
    assert "VM 0 (web) has the same MAC address 52:54:00:00:00:01" in same.result["notes"][0]
    for option in ("no_ip", "no_nic"):
        other = stored.run(
            "restore", image_id=0, to=str(tmp_path / option), define_host_id=0, **{option: True}
        )
        assert other.state is OperationState.DONE, other.error
        assert "notes" not in other.result


def monitored(name: str, uuid: str) -> dict[str, str]:
    domain = f"<DOMAIN><NAME>{name}</NAME><UUID>{uuid}</UUID><STATE>OFF</STATE></DOMAIN>"
    return {"DOMAINS": f"<DOMAINS>{domain}</DOMAINS>"}


def test_a_domain_of_that_name_that_is_not_ours_keeps_nothing(stored: World, tmp_path: Path) -> None:
    def somebody_else_was_faster(_request: Request) -> None:
        stored.drivers.answers["monitor"] = lambda _request: monitored("web-restored-1", "theirs")
        raise Conflict("the host has a domain named web-restored-1 already")

    stored.drivers.script["define"] = [somebody_else_was_faster]
    failed = stored.run("restore", image_id=0, to=str(tmp_path / "out"), define_host_id=0)
    assert failed.state is OperationState.FAILED
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("concurrency", "cancel of a restore")
def test_cancelled_in_the_middle(stored: World, tmp_path: Path) -> None:
    cancellation = Cancellation()
    stored.drivers.script["download"] = [lambda _request: cancellation.cancel()]
    ended = stored.run("restore", cancellation=cancellation, image_id=0, to=str(tmp_path / "out"))
    assert ended.state is OperationState.CANCELLED
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [DataCorrupt("disk 0: bad"), NoSpace("full")])
def test_what_no_retry_can_help_is_not_retried(
    stored: World, tmp_path: Path, error: DataCorrupt | NoSpace
) -> None:
    stored.drivers.script["download"] = [error]
    failed = stored.run("restore", image_id=0, to=str(tmp_path / "out"))
    assert json.loads(failed.error)["code"] == type(error).__name__
    assert stored.drivers.actions.count("download") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda _to: {"to": "relative"},
        lambda to: {"to": f"{to}/../x"},
        lambda to: {"to": to, "format": "vmdk"},
        lambda to: {"to": to, "increment_id": 5},
    ],
)
def test_nonsense_is_refused_before_anything_is_made(
    stored: World, tmp_path: Path, change: Callable[[str], dict[str, object]]
) -> None:
    failed = stored.run("restore", image_id=0, **change(str(tmp_path / "out")))
    assert json.loads(failed.error)["code"] in {"InvalidInput", "NotFound"}
    assert not (tmp_path / "out").exists()


def test_no_secret_gets_into_the_journal(stored: World, tmp_path: Path) -> None:
    done = stored.run("restore", image_id=0, to=str(tmp_path / "out"))
    journal = stored.services.store.journal
    text = str([(step.data, step.result) for step in journal.steps(done.id)])
    assert "secret variables" not in text
    assert "c2VjcmV0" not in text
    assert not (stored.services.settings.work_dir / done.id).exists()


@pytest.mark.parametrize("error", [DataCorrupt("disk 0: bad"), Salvaged("disk 0: 64 KiB are zero")])
def test_damage_that_a_restore_meets_is_entered(
    stored: World, tmp_path: Path, error: DataCorrupt | Salvaged
) -> None:
    def damaged(request: Request) -> None:
        Path(request.options["TARGET"]).write_bytes(b"disk")
        raise error

    stored.run("backup", vm_id=0)
    stored.drivers.script["download"] = [damaged]
    for row in stored.services.store.backups():
        stored.services.store.mark_backup(row.backup_id, verified_at=7.0)
    assert stored.services.vm(0).config.has_chain
    ended = stored.run("restore", image_id=0, increment_id=0, to=str(tmp_path / "out"))
    assert ended.state is (OperationState.DONE if isinstance(error, Salvaged) else OperationState.FAILED)
    assert "marked as BROKEN" in ended.result["notes"][0]
    # what continues the damaged one is BROKEN with it, and the chain is not continued
    assert {row.state for row in stored.services.store.backups()} == {BackupState.BROKEN}
    assert {row.verified_at for row in stored.services.store.backups()} == {None}
    assert not stored.services.vm(0).config.has_chain


def test_a_vm_is_not_defined_over_selected_disks(stored: World, tmp_path: Path) -> None:
    def selected(element: xmldoc.Element) -> xmldoc.Element:
        changed = xmldoc.copy(element)
        xmldoc.put(changed, "TEMPLATE", {"BACKUP_SELECTED_DISKS": "YES"})
        return changed

    stored.services.store.change("image", 0, selected)
    refused = stored.run("restore", image_id=0, to=str(tmp_path / "out"), define_host_id=0)
    assert json.loads(refused.error)["code"] == "InvalidInput"
    assert "cannot restore a VM from a selected disk backup" in json.loads(refused.error)["message"]
    one = stored.run("restore", image_id=0, to=str(tmp_path / "one"), define_host_id=0, disk_id=0)
    assert one.state is OperationState.DONE, one.error
    files = stored.run("restore", image_id=0, to=str(tmp_path / "files"))
    assert files.state is OperationState.DONE, files.error


def test_a_directory_that_cannot_be_made_is_no_fault_of_ours(stored: World) -> None:
    failed = stored.run("restore", image_id=0, to="/proc/no/such")
    assert json.loads(failed.error)["code"] == "NotFound"
    failed = stored.run("restore", image_id=0, to="/srv/a\0b")
    assert json.loads(failed.error)["code"] == "InvalidInput"
