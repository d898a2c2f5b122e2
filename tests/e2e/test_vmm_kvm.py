"""vmm/kvm against a real libvirt."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from backed_up_vm import BackedUpVm
from lab import Guest, Libvirtd, data_disk

from oned_backup import xmldoc
from oned_backup.errors import Conflict, NotFound, Unavailable

pytestmark = pytest.mark.guest


@pytest.fixture
def vm(
    make_guest: Callable[..., Guest], back_up: Callable[[Guest], BackedUpVm], tmp_path: Path
) -> BackedUpVm:
    """A VM with one small disk and no operating system, off."""
    return back_up(make_guest([data_disk(tmp_path, 16)], start=False, boot="disk", agent=False))


def test_monitor_tells_the_state_of_every_domain(vm: BackedUpVm) -> None:
    def state() -> str:
        domains = xmldoc.parse(vm.vmm("monitor")["DOMAINS"])
        found = [domain for domain in domains if xmldoc.text(domain, "UUID") == vm.guest.uuid]
        assert [xmldoc.text(domain, "NAME") for domain in found] == [vm.guest.name]
        return xmldoc.text(found[0], "STATE")

    assert state() == "OFF"
    vm.guest.start()
    assert state() == "RUNNING"
    vm.guest.suspend()
    assert state() == "PAUSED"


@pytest.mark.parametrize("running", [False, True])
def test_dump_xml_by_uuid_and_by_name(vm: BackedUpVm, running: bool) -> None:
    if running:
        vm.guest.start()
    for key in (vm.guest.uuid, vm.guest.name):
        answer = vm.vmm("dump_xml", DOMAIN=key)
        assert xmldoc.text(xmldoc.parse(answer["DOMAIN"]), "uuid") == vm.guest.uuid
        assert answer["STATE"] == ("RUNNING" if running else "OFF")
        assert answer["CAPACITY"] == f"vda:{16 << 20}"
    with pytest.raises(NotFound, match="is not defined"):
        vm.vmm("dump_xml", DOMAIN="nobody")
    asked = f"11111111-0000-4000-8000-000000000001,{vm.guest.uuid}"
    (told,) = xmldoc.parse(vm.vmm("dump_domains", DOMAINS=asked)["DOMAINS"])
    assert [xmldoc.text(told, name) for name in ("UUID", "STATE", "CAPACITY")] == [
        vm.guest.uuid,
        answer["STATE"],
        answer["CAPACITY"],
    ]
    definition = told.find("domain")
    assert definition is not None
    assert xmldoc.serialize(definition) == answer["DOMAIN"]


def test_define_with_the_state_of_its_tpm(vm: BackedUpVm, tmp_path: Path) -> None:
    archive = tmp_path / "tpm.tar"
    with tarfile.open(archive, "w") as tar:
        entry = tarfile.TarInfo("tpm2/tpm2-00.permall")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"state"))
    definition = xmldoc.parse(vm.guest.xml())
    definition.remove(definition.find("uuid"))
    xmldoc.put(definition, "name", "it's restored")
    text = xmldoc.serialize(definition)
    connection = vm.guest.libvirtd.connection
    try:
        assert vm.vmm("define", DOMAIN=text, TPM_TAR=str(archive)) == {"DEPLOY_ID": "it's restored"}
        domain = connection.lookupByName("it's restored")
        state = vm.guest.libvirtd.swtpm_dir / domain.UUIDString() / "tpm2" / "tpm2-00.permall"
        assert state.read_bytes() == b"state"
        with pytest.raises(Conflict, match="already"):
            vm.vmm("define", DOMAIN=text)
    finally:
        connection.lookupByName("it's restored").undefine()


@pytest.mark.whole_matrix
def test_a_restored_tpm_is_read_by_the_user_that_swtpm_runs_as(short_dir: Path) -> None:
    with Libvirtd() as server:
        guest = Guest(
            server, short_dir, "secure", [data_disk(short_dir, 16)], boot="disk", agent=False, tpm=True
        )
        guest.start()
        guest.end()
        vm = BackedUpVm(guest, short_dir, short_dir / "s")
        point = vm.backup()
        server.swtpm_user = "tss"  # as distributions have it
        server.restart()
        definition = xmldoc.parse(guest.xml())
        definition.remove(definition.find("uuid"))
        xmldoc.put(definition, "name", "restored")
        vm.vmm("define", DOMAIN=xmldoc.serialize(definition), TPM_TAR=str(point.files / "tpm.tar"))
        restored = server.connection.lookupByName("restored")
        restored.create()
        assert restored.isActive()
        restored.destroy()
        state = server.swtpm_dir / restored.UUIDString() / "tpm2" / "tpm2-00.permall"
        with tarfile.open(point.files / "tpm.tar") as tar:
            kept = tar.extractfile("tpm2/tpm2-00.permall")
            assert kept is not None
            assert state.stat().st_size == len(kept.read())


def test_thaw_does_no_harm_and_resumes_only_what_was_suspended_by_us(vm: BackedUpVm) -> None:
    vm.vmm("thaw", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
    vm.guest.start()
    vm.guest.suspend()
    vm.vmm("thaw", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
    assert vm.guest.is_paused()
    note = vm.socket_dir / "op-00000000dead" / "suspended"
    note.parent.mkdir(parents=True)
    note.write_text(vm.guest.uuid)
    vm.vmm("thaw", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
    assert not vm.guest.is_paused()
    assert not note.exists()


def test_abort_backup_ends_our_job(vm: BackedUpVm) -> None:
    vm.vmm("abort_backup", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
    vm.guest.start()
    files = vm.directory / "files"
    files.mkdir()
    vm.tm("pre_backup_live", vm.next_backup(), files=files, operation_id="op-00000000dead")
    assert vm.guest.has_backup_job()
    for _ in range(2):
        vm.vmm("abort_backup", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
        assert not vm.guest.has_backup_job()


@pytest.mark.fault("host", "hypervisor unreachable at the start")
def test_unreachable_libvirt_is_unknown_and_not_absent(vm: BackedUpVm) -> None:
    template = vm.host.element.find("TEMPLATE")
    assert template is not None
    xmldoc.put(template, "URI", "qemu:///system?socket=/tmp/there-is-no-such-socket")
    with pytest.raises(Unavailable, match="libvirt at qemu"):
        vm.vmm("dump_xml", DOMAIN=vm.guest.uuid)
