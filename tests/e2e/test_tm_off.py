"""tm/qcow2 on a guest that is off, and on one that changes its state in mid-chain."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest
from backed_up_vm import BackedUpVm, command, new_file, processes
from lab import Guest, LabDisk, data_disk, root_disk

from oned_backup.contract.request import Outcome
from oned_backup.errors import Busy, NotFound

pytestmark = pytest.mark.guest

BackUp = Callable[[Guest], BackedUpVm]


@pytest.mark.fault("guest", "QEMU killed between backups")
@pytest.mark.fault("change tracking", "bitmap inconsistent")
@pytest.mark.fault("change tracking", "image written while off by another program")
def test_chain_goes_on_from_running_to_off_to_running(
    make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path
) -> None:
    raw = data_disk(tmp_path, 16, name="raw", disk_format="raw")
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 32), raw])
    vm = back_up(guest)
    vm.backup()
    new_file(guest, "/data/vdb/a", 2)
    guest.stop()

    point = vm.backup(fs_freeze="AGENT")  # what changed while it ran and shut down
    reasons = {disk.target: disk.reason.value for disk in point.exports.disks}
    assert reasons == {"vda": "increment", "vdb": "increment", "vdc": "no-change-tracking"}
    for target in ("vda", "vdb", "vdc"):
        vm.assert_restores(target)

    command("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 3M", str(tmp_path / "data.qcow2"))
    point = vm.backup()  # what changed while it was off
    assert point.reason("vdb") == "increment"
    assert (point.files / f"disk.1.{point.exports.increment_id}").stat().st_size >= 3 << 20
    vm.assert_restores("vdb")

    guest.start()
    guest.wait_ready()
    point = vm.backup()  # what changed since, from a bitmap that was made while it was off
    assert point.reason("vda") == point.reason("vdb") == "increment"
    for target in ("vda", "vdb"):
        vm.assert_restores(target)
    assert vm.checkpoints() == [point.exports.checkpoint]

    # QEMU dies: the bitmap made since it started was never written to the image
    new_file(guest, "/root/unsafe", 1)
    guest.kill()
    point = vm.backup()
    assert (point.reason("vda"), point.reason("vdb")) == ("bitmap-missing", "bitmap-missing")
    assert point.exports.increment_id == 0
    for target in ("vda", "vdb"):
        vm.assert_restores(target)

    # it dies again: the bitmap made while it was off lies in the image and was not closed
    guest.start()
    guest.kill()
    guest.start()
    point = vm.backup()
    assert (point.reason("vda"), point.reason("vdb")) == ("bitmap-inconsistent", "bitmap-inconsistent")
    for target in ("vda", "vdb"):
        vm.assert_restores(target)
    assert vm.backup().reason("vda") == "increment"
    guest.end()
    point = vm.backup()
    assert point.reason("vda") == "increment"
    assert bitmaps(tmp_path / "root.qcow2") == {point.exports.checkpoint}


@pytest.mark.whole_matrix
@pytest.mark.fault("guest", "saved to disk (managed save), and started again")
def test_chain_goes_on_through_a_managed_save(
    make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path
) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 32)])
    vm = back_up(guest)
    vm.backup()
    new_file(guest, "/data/vdb/a", 2)
    guest.domain.managedSave(0)
    for goes_on in (lambda: None, guest.domain.create):
        goes_on()
        point = vm.backup()
        assert {disk.reason.value for disk in point.exports.disks} == {"increment"}
        for target in ("vda", "vdb"):
            vm.assert_restores(target)
    new_file(guest, "/data/vdb/b", 2)
    guest.stop()
    assert "No errors" in command("qemu-img", "check", str(tmp_path / "data.qcow2"))
    vm.assert_survived()


@pytest.fixture
def off(make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path) -> BackedUpVm:
    """A VM with one small disk that is off."""
    return back_up(make_guest([data_disk(tmp_path, 16)], start=False, boot="disk", agent=False))


@pytest.mark.fault("change tracking", "external snapshot by somebody else")
def test_changes_on_both_sides_of_an_overlay_made_by_libvirt(off: BackedUpVm, tmp_path: Path) -> None:
    base, overlay = tmp_path / "data.qcow2", tmp_path / "overlay.qcow2"
    off.backup()
    command("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 64k", str(base))
    off.guest.start()
    off.guest.domain.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda'><source file='{overlay}'/></disk></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    off.guest.end()
    command("qemu-io", "-f", "qcow2", "-c", "write -P 2 9M 64k", str(overlay))
    off.guest.use_disk(0, overlay)
    point = off.backup()
    assert point.reason("vda") == "increment"
    assert point.disk("vda").backing == (str(base),)
    off.assert_restores("vda")
    assert bitmaps(overlay) == {point.exports.checkpoint}


@pytest.mark.fault("change tracking", "external snapshot, overlay grown")
def test_changes_that_cannot_be_merged_make_the_disk_full(off: BackedUpVm, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    off.backup()
    off.guest.start()
    off.guest.domain.snapshotCreateXML(
        f"<domainsnapshot><disks><disk name='vda'><source file='{overlay}'/></disk></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    off.guest.domain.blockResize("vda", 32 << 20, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    lost = off.directory / "lost"
    lost.mkdir()
    place = {"files": lost, "operation_id": "op-00000000dead"}
    backup = off.next_backup()
    off.tm("pre_backup_live", backup, **place)
    assert any("checkpoint-invalid" in line for line in off.log)
    keep = off.points[-1].exports.checkpoint
    off.tm("post_backup_live", backup, **place, outcome=Outcome.FAILURE, KEEP_CHECKPOINT=keep)
    off.guest.end()
    off.guest.use_disk(0, overlay)
    assert off.backup().reason("vda") == "checkpoint-invalid"
    off.assert_restores("vda")
    command("qemu-io", "-f", "qcow2", "-c", "write -P 2 20M 64k", str(overlay))
    assert off.backup().reason("vda") == "increment"
    off.assert_restores("vda")


@pytest.mark.fault("change tracking", "bitmap switched off")
def test_bitmap_that_was_switched_off_is_not_believed(off: BackedUpVm, tmp_path: Path) -> None:
    disk = str(tmp_path / "data.qcow2")
    checkpoint = off.backup().exports.checkpoint
    command("qemu-img", "bitmap", "--disable", "-f", "qcow2", disk, checkpoint)
    command("qemu-io", "-f", "qcow2", "-c", "write -P 9 5M 64k", disk)
    assert off.backup().reason("vda") == "bitmap-inconsistent"
    off.assert_restores("vda")


@pytest.mark.fault("change tracking", "linked clone on the image")
def test_linked_clone_leaves_the_bitmaps_of_its_base_alone(
    off: BackedUpVm, make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    (tmp_path / "clone").mkdir()
    off.backup()
    disk = LabDisk(tmp_path / "clone" / "clone.qcow2", "qcow2")
    base = str(tmp_path / "data.qcow2")
    command("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "qcow2", str(disk.path))
    clone = BackedUpVm(
        make_guest([disk], start=False, boot="disk", agent=False), tmp_path / "clone", off.socket_dir
    )
    clone.next_backup()  # a name that the other VM has not used
    clone.backup()
    clone.backup()
    assert off.backup().reason("vda") == "increment"
    off.assert_restores("vda")


@pytest.mark.fault("guest", "another domain has taken its name")
def test_another_domain_of_the_same_name_is_another_vm(
    off: BackedUpVm, make_guest: Callable[..., Guest], tmp_path: Path
) -> None:
    known = off.document()
    off.guest.domain.undefine()
    other = Guest(off.guest.libvirtd, tmp_path, off.guest.name, off.guest.disks, boot="disk", agent=False)
    try:
        off.document = lambda: known  # type: ignore[method-assign]
        with pytest.raises(NotFound):
            off.tm("pre_backup", off.next_backup(), files=tmp_path, operation_id="op-00000000000a")
    finally:
        other.destroy()


@pytest.mark.fault("guest", "image replaced under the same name")
def test_another_image_under_the_same_name_is_stored_whole(off: BackedUpVm, tmp_path: Path) -> None:
    off.backup()
    disk = tmp_path / "data.qcow2"
    disk.rename(tmp_path / "old.qcow2")
    command("qemu-img", "convert", "-O", "qcow2", "--bitmaps", str(tmp_path / "old.qcow2"), str(disk))
    point = off.backup()
    assert point.reason("vda") == "disk-replaced"
    assert point.exports.increment_id == 0
    off.assert_restores("vda")


@pytest.mark.fault("guest", "stopped between plan and freeze")
def test_wrong_state_is_busy_and_nothing_is_left(off: BackedUpVm) -> None:
    files = off.directory / "files"
    files.mkdir()
    with pytest.raises(Busy, match="is not running"):
        off.tm("pre_backup_live", off.next_backup(), files=files, operation_id="op-00000000000a")
    off.guest.start()
    with pytest.raises(Busy, match="is running"):
        off.tm("pre_backup", off.next_backup(), files=files, operation_id="op-00000000000b")
    off.assert_nothing_left("op-00000000000b")


@pytest.mark.fault("host", "image in use by another process")
def test_image_in_use_by_somebody_else_is_busy_and_keeps_the_chain(off: BackedUpVm, tmp_path: Path) -> None:
    off.backup()
    other = Guest(off.guest.libvirtd, tmp_path, "other", off.guest.disks, boot="disk", agent=False)
    try:
        other.start()
        with pytest.raises(Busy, match="another process"):
            off.tm("pre_backup", off.next_backup(), files=off.directory, operation_id="op-00000000000c")
    finally:
        other.destroy()
    off.assert_nothing_left("op-00000000000c")
    assert off.backup().reason("vda") == "increment"


@pytest.mark.fault("guest", "starts while it is backed up off")
def test_killed_in_the_off_state_and_started_before_the_clean_up(off: BackedUpVm) -> None:
    off.backup()
    backup = off.next_backup()
    lost = off.directory / "lost"
    lost.mkdir()
    off.tm("pre_backup", backup, files=lost, operation_id="op-00000000dead")
    assert sum("qemu-nbd" in line for line in processes(off.socket_dir)) == 1
    with pytest.raises(libvirt.libvirtError, match="lock"):
        off.guest.start()  # the image is being read
    for action in ("post_backup_live", "post_backup"):
        off.tm(
            action,
            backup,
            files=lost,
            operation_id="op-00000000dead",
            outcome=Outcome.FAILURE,
            KEEP_CHECKPOINT=off.points[-1].exports.checkpoint,
        )
        off.assert_nothing_left("op-00000000dead")
    assert bitmaps(off.directory / "data.qcow2") == {off.points[-1].exports.checkpoint}
    off.guest.start()
    assert off.backup().reason("vda") == "increment"


def test_nvram_and_tpm_travel_with_the_backup(
    make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path
) -> None:
    guest = make_guest([data_disk(tmp_path, 16)], start=False, boot="disk", agent=False, uefi=True, tpm=True)
    guest.start()
    vm = back_up(guest)
    point = vm.backup()
    assert set(point.exports.files) == {"vm.xml", "domain.xml", "nvram.fd", "tpm.tar"}
    assert guest.nvram is not None
    assert (point.files / "nvram.fd").read_bytes() == guest.nvram.read_bytes()
    with tarfile.open(point.files / "tpm.tar") as tar:
        assert "tpm2/tpm2-00.permall" in tar.getnames()
    assert b"<name>" + guest.name.encode() in (point.files / "domain.xml").read_bytes()
    assert point.exports.freeze.warning == ""
    state = guest.libvirtd.swtpm_dir / guest.uuid
    state.rename(tmp_path / "elsewhere")
    warning = vm.backup().exports.freeze.warning
    assert warning == "the state of its TPM was not found: it is not in the backup"
    (tmp_path / "elsewhere").rename(state)
    guest.end()
    assert set(vm.backup().exports.files) == {"vm.xml", "domain.xml", "nvram.fd", "tpm.tar"}


def bitmaps(image: Path) -> set[str]:
    """The names of the persistent bitmaps in an image."""
    info = json.loads(command("qemu-img", "info", "--output=json", str(image)))
    return {entry["name"] for entry in info["format-specific"]["data"].get("bitmaps", [])}
