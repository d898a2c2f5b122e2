"""What is changed at once must not harm what is under way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from oned_backup.config import Settings
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Request
from oned_backup.daemon.directories import make_directories
from oned_backup.errors import Conflict, Misconfigured, NotFound, Unavailable
from oned_backup.model.datastore import Datastore, with_image
from oned_backup.model.vm import VmState
from oned_backup.operations import inventory
from oned_backup.operations.datastores import (
    create_datastore,
    delete_datastore,
    measure,
    unreadable_secrets,
    update_datastore,
)
from oned_backup.operations.inventory import add_host, configure_vm, forget_vm, import_vms
from oned_backup.runner.drivers import Driver
from oned_backup.runner.skeleton import new_driver
from oned_backup.store import BackupState, OperationState, SecretBox

from .conftest import DOMAIN, World


def test_a_datastore_that_is_being_written_to_stays(world: World) -> None:
    def delete(_request: Request) -> None:
        with pytest.raises(Conflict, match="is using it"):
            delete_datastore(world.services, 100)

    world.drivers.script["backup"] = [delete]
    assert world.run("backup", vm_id=0).state is OperationState.DONE


def test_disks_are_not_chosen_anew_during_a_backup(world: World) -> None:
    def configure(_request: Request) -> None:
        with pytest.raises(Conflict, match="is being backed up"):
            configure_vm(world.services, 0, {"DISK_IDS": "0"})
        configure_vm(world.services, 0, {"KEEP_LAST": "3"})

    world.drivers.script["backup"] = [configure]
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE, done.error
    assert not world.services.image(0).has_selected_disks
    assert world.services.vm(0).config.keep_last == 3


@pytest.mark.parametrize("fails", [True, False])
def test_an_update_loses_no_image_that_is_stored_meanwhile(world: World, *, fails: bool) -> None:
    def stored(_request: Request) -> None:
        world.services.store.change(
            "datastore", 100, lambda element: with_image(Datastore(element), 7).element
        )
        if fails:
            raise Unavailable("it has gone")

    world.drivers.script["monitor"] = [stored]
    if fails:
        with pytest.raises(Unavailable):
            update_datastore(world.services, 100, {}, name="other")
    else:
        update_datastore(world.services, 100, {}, name="other")
    datastore = world.services.datastore(100)
    assert datastore.image_ids == (7,)
    assert datastore.name == ("b" if fails else "other")


def test_secrets_whose_key_file_is_lost_can_be_set_again(world: World) -> None:
    values = {"RESTIC_SFTP_SERVER": "bk", "BASE_PATH": "/srv/restic", "RESTIC_PASSWORD": "geheim"}
    datastore_id = create_datastore(world.services, "vault", "restic", values).id
    other = replace(world.services, box=SecretBox(bytes(32)))
    with pytest.raises(Misconfigured, match="cannot be decrypted") as caught:
        measure(other, datastore_id)
    assert "oned-backup datastore update" in (caught.value.hint or "")
    assert unreadable_secrets(world.services) == []
    (unreadable,) = unreadable_secrets(other)
    assert f"datastore/{datastore_id}/RESTIC_PASSWORD" in unreadable
    update_datastore(other, datastore_id, {"RESTIC_PASSWORD": "geheim"})
    assert measure(other, datastore_id).free_mb == 999
    assert unreadable_secrets(other) == []


def test_retention_does_not_count_a_broken_backup(world: World) -> None:
    configure_vm(world.services, 0, {"MODE": "FULL"})
    world.run("backup", vm_id=0)
    bad = world.run("backup", vm_id=0).result["backup_id"]
    world.services.store.mark_backup(bad, state=BackupState.BROKEN, failure="bit rot")
    configure_vm(world.services, 0, {"KEEP_LAST": "2"})
    world.run("backup", vm_id=0)
    world.run_queued()
    assert world.services.vm(0).backup_ids == (0, 1, 2)


def test_an_image_of_a_store_that_has_gone_is_forgotten_with_force(world: World) -> None:
    world.run("backup", vm_id=0)
    world.drivers.script["rm"] = [Unavailable("gone")] * 50
    failed = world.run("delete", image_id=0)
    assert failed.state is OperationState.FAILED
    assert json.loads(failed.error)["code"] == "Unavailable"
    assert world.services.image(0).state_name == "DELETE"
    done = world.run("delete", image_id=0, force=True)
    assert done.state is OperationState.DONE, done.error
    assert "left in datastore 100" in done.result["notes"][0]
    assert world.services.store.backups() == []
    assert world.services.datastore(100).image_ids == ()


def test_a_vm_that_is_forgotten_stays_for_its_images_and_goes_with_the_last(world: World) -> None:
    world.run("backup", vm_id=0)
    kept = forget_vm(world.services, 0)
    assert kept.name == "web"
    vm = world.services.vm(0)
    assert vm.state == VmState.DONE
    assert vm.backup_ids == (0,)
    assert 0 not in world.services.host(0).vm_ids
    with pytest.raises(Conflict, match="but for its images"):
        forget_vm(world.services, 0)
    assert world.run("delete", image_id=0).state is OperationState.DONE
    with pytest.raises(NotFound):
        world.services.vm(0)


def test_a_vm_without_backups_is_forgotten_at_once_but_not_in_a_backup(world: World) -> None:
    def forget(_request: Request) -> None:
        with pytest.raises(Conflict, match=r"backup .* is RUNNING"):
            forget_vm(world.services, 0)
        raise Unavailable("gone")

    world.drivers.script["backup"] = [forget] * 50
    assert world.run("backup", vm_id=0).state is OperationState.FAILED
    forget_vm(world.services, 0)
    with pytest.raises(NotFound):
        world.services.vm(0)


def test_a_store_that_has_gone_is_measured_again(world: World) -> None:
    world.run("backup", vm_id=0)
    world.drivers.calls.clear()
    world.drivers.script["backup"] = [Unavailable("gone")]
    assert world.run("backup", vm_id=0).state is OperationState.DONE
    # found by its own measure the first time (that one is fresh), asked again before the second attempt
    assert world.drivers.actions.count("monitor") == 1


def test_directories_that_cannot_be_made_are_a_setting_that_is_wrong() -> None:
    settings = Settings(state_dir=Path("/proc/none"), run_dir=Path("/proc/none/run"))
    with pytest.raises(Misconfigured, match="/proc/none cannot be made"):
        make_directories(settings)


@pytest.mark.parametrize("at_once", [True, False], ids=["in one call", "each alone"])
def test_all_domains_of_a_host_are_imported_in_few_steps(
    world: World, monkeypatch: pytest.MonkeyPatch, *, at_once: bool
) -> None:
    count = inventory._AT_ONCE + 10
    uuids = [f"{number:08x}-0000-4000-8000-000000000002" for number in range(count)]
    domains = "".join(
        f"<DOMAIN><NAME>vm {uuid[:8]}</NAME><UUID>{uuid}</UUID><STATE>RUNNING</STATE></DOMAIN>"
        for uuid in uuids
    )
    gone = uuids.pop(7)

    def dump_xml(request: Request) -> dict[str, str]:
        uuid = request.options["DOMAIN"]
        if uuid == gone:
            raise NotFound(f"domain {uuid} is not defined on the host")
        return {
            "DOMAIN": DOMAIN.replace("\n", " ").replace("9a1c2b3d-0000-4000-8000-000000000001", uuid),
            "STATE": "RUNNING",
            "CAPACITY": "vda:1048576",
        }

    world.drivers.answers["dump_xml"] = dump_xml
    world.drivers.answers["monitor"] = lambda _request: {"DOMAINS": f"<DOMAINS>{domains}</DOMAINS>"}
    if not at_once:
        monkeypatch.setattr(Driver, "supports", lambda _driver, action: action != "dump_domains")
    told = import_vms(world.services, 0, [], every=True)
    assert [(entry["uuid"], entry["result"]) for entry in told] == [(uuid, "imported") for uuid in uuids]
    assert world.drivers.actions[1:] == (["dump_domains"] * 2 if at_once else ["dump_xml"] * count)
    assert list(world.services.host(0).vm_ids) == [entry["id"] for entry in told]
    assert world.services.vm(told[-1]["id"]).disks[0].size_mb == 1
    again = import_vms(world.services, 0, [], every=True)
    assert {entry["result"] for entry in again} == {"known"}
    assert [entry["id"] for entry in again] == [entry["id"] for entry in told]


def test_a_vm_that_moves_keeps_its_disks_ids_and_its_configuration(world: World) -> None:
    def domain(*targets: str) -> dict[str, str]:
        disks = "".join(
            f"<disk type='file' device='disk'><driver type='qcow2'/><source file='/srv/{target}.qcow2'/>"
            f"<target dev='{target}'/></disk>"
            for target in targets
        )
        head = "<domain type='kvm'><name>web</name><uuid>9a1c2b3d-0000-4000-8000-000000000001</uuid>"
        return {"DOMAIN": f"{head}<devices>{disks}</devices></domain>", "STATE": "RUNNING", "CAPACITY": ""}

    services = world.services
    world.drivers.answers["monitor"] = lambda request: (
        {"TOTAL_MB": "9", "USED_MB": "0", "FREE_MB": "9"}
        if request.datastore is not None
        else {
            "DOMAINS": "<DOMAINS><DOMAIN><NAME>web</NAME>"
            "<UUID>9a1c2b3d-0000-4000-8000-000000000001</UUID><STATE>RUNNING</STATE></DOMAIN></DOMAINS>"
        }
    )
    for targets in (("vda", "vdb", "vdc"), ("vda", "vdc")):
        world.drivers.answers["dump_xml"] = lambda _request, targets=targets: domain(*targets)
        world.run("backup", vm_id=0)
    configure_vm(services, 0, {"DISK_IDS": "2", "KEEP_LAST": "5"})
    before = services.vm(0)
    other = add_host(services, "other", uri="qemu+ssh://other/system", vm_mad="kvm", tm_mad="qcow2")
    (told,) = import_vms(services, other.id, ["web"], every=False)
    assert told["result"] == "adopted"
    vm = services.vm(0)
    assert vm.host_id == other.id
    assert [(disk.disk_id, disk.target) for disk in vm.disks] == [(0, "vda"), (2, "vdc")]
    assert (vm.next_disk_id, vm.config, vm.backup_ids) == (3, before.config, before.backup_ids)
    assert (services.host(0).vm_ids, services.host(other.id).vm_ids) == ((), (0,))


def test_a_hypervisor_without_libvirt_has_uris_of_its_own(world: World, tmp_path: Path) -> None:
    new_driver(tmp_path / "drivers/vmm", "esx", Kind.VMM)
    settings = world.services.settings.model_copy(update={"driver_dirs": (tmp_path / "drivers",)})
    services = replace(world.services, settings=settings)
    uri = "esx+https://admin@esx1/ha-datacenter?no_verify=1"
    with pytest.raises(Misconfigured, match="is reached by ssh or is this machine"):
        add_host(services, "kvm1", uri=uri, vm_mad="kvm", tm_mad="qcow2")
    assert add_host(services, "esx1", uri=uri, vm_mad="esx", tm_mad="dummy").uri == uri
