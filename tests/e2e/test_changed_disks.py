"""Disks that are changed behind the back of change tracking, between two backups.

The domain has no operating system; what it would write is written by QEMU itself, or by
qemu-io while it is off. Each test ends with `assert_survived`: every restore point is what it
was, and the chain goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest
from backed_up_vm import BackedUpVm, command
from lab import Guest, LabDisk, Libvirtd, disk_xml, wait_for

from oned_backup.errors import Busy, Misconfigured, Unavailable
from oned_backup.hypervisor.backup_job import JobDisk, job_xml
from oned_backup.model.backup_config import BackupConfig, Mode
from oned_backup.model.names import checkpoint_name

pytestmark = pytest.mark.guest

Observed = Callable[[str, object], None]
MIB = 1 << 20


@pytest.fixture
def vm(
    make_guest: Callable[..., Guest], back_up: Callable[[Guest], BackedUpVm], tmp_path: Path
) -> BackedUpVm:
    """A VM with two disks of 16 MiB that is off, backed up once."""
    disks = [LabDisk(tmp_path / f"{name}.qcow2") for name in ("one", "two")]
    for number, disk in enumerate(disks):
        command("qemu-img", "create", "-q", "-f", "qcow2", str(disk.path), "16M")
        command("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} 0 16M", str(disk.path))
    vm = back_up(make_guest(disks, start=False, boot="disk", agent=False))
    vm.backup()
    return vm


def write(vm: BackedUpVm, *commands: str, disk: int = 0) -> None:
    """QEMU writes, or while it is off qemu-io."""
    if not vm.guest.is_active():
        arguments = [word for text in commands for word in ("-c", text)]
        command("qemu-io", "-f", "qcow2", *arguments, str(vm.guest.disks[disk].path))
        return
    for text in commands:
        device = f"/machine/peripheral/virtio-disk{disk}/virtio-backend"
        said = libvirt_qemu.qemuMonitorCommand(vm.guest.domain, f'qemu-io -d {device} "{text}"', 1)
        assert said == "", said  # what it prints otherwise goes to the log of QEMU


def reasons(vm: BackedUpVm) -> str:
    """A backup's reasons, disk by disk, after its content was compared."""
    point = vm.backup()
    for disk in point.exports.disks:
        vm.assert_restores(disk.target)
    return ", ".join(disk.reason.value for disk in point.exports.disks)


@pytest.mark.fault("guest", "disk grown while off")
def test_it_grows_while_off(vm: BackedUpVm, record_property: Observed) -> None:
    command("qemu-img", "resize", "-q", str(vm.guest.disks[0].path), "24M")
    write(vm, "write -P 9 20M 64k")
    record_property("observed", reasons(vm))
    vm.assert_survived()


@pytest.mark.fault("guest", "disk grown while it runs, between backups")
def test_it_grows_while_it_runs(vm: BackedUpVm, record_property: Observed) -> None:
    vm.guest.start()
    assert reasons(vm) == "increment, increment"
    vm.guest.domain.blockResize("vda", 24 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    write(vm, "write -P 9 20M 64k", "write -P 9 1M 64k")
    said = reasons(vm)
    assert said == "increment, increment"
    size = vm.points[-1].disk("vda").size_bytes
    assert size == 24 * MIB
    record_property("observed", f"{said}; {size >> 20} MiB")
    vm.assert_survived()


@pytest.mark.fault("guest", "disk shrunk while off")
def test_it_shrinks_while_off(vm: BackedUpVm, record_property: Observed) -> None:
    command("qemu-img", "resize", "-q", "--shrink", str(vm.guest.disks[0].path), "8M")
    said = reasons(vm)
    assert said == "disk-shrunk, increment"
    record_property("observed", said)
    vm.assert_survived()


@pytest.mark.fault("guest", "disk shrunk and grown again while off")
def test_it_shrinks_and_grows_again_while_off(vm: BackedUpVm, record_property: Observed) -> None:
    disk = str(vm.guest.disks[0].path)
    command("qemu-img", "resize", "-q", "--shrink", disk, "8M")
    command("qemu-img", "resize", "-q", disk, "16M")
    said = reasons(vm)
    assert said == "changed-unseen, increment"
    record_property("observed", said)
    vm.assert_survived()


@pytest.mark.fault("guest", "disk shrunk and grown again while off")
@pytest.mark.fault("guest", "disk shrunk and grown again while it runs")
def test_it_loses_a_little_at_its_end(vm: BackedUpVm, record_property: Observed) -> None:
    disk = str(vm.guest.disks[0].path)
    command("qemu-img", "resize", "-q", disk, "256M")
    write(vm, "write -P 9 248M 64k", "write -P 9 253M 64k")  # none of the evenly spaced places
    assert reasons(vm) == "increment, increment"
    command("qemu-img", "resize", "-q", "--shrink", disk, "252M")
    command("qemu-img", "resize", "-q", disk, "256M")
    said = reasons(vm)
    assert said == "changed-unseen, increment"
    record_property("observed", ["disk shrunk and grown again while off", f"{said}, also of one cluster"])
    vm.guest.start()
    for size in (240, 256):
        vm.guest.domain.blockResize("vda", size * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    said = reasons(vm)
    assert said == "changed-unseen, increment"
    record_property("observed", ["disk shrunk and grown again while it runs", said])
    vm.assert_survived()


@pytest.mark.fault("guest", "contents of two disks swapped in place")
def test_contents_are_swapped(vm: BackedUpVm, tmp_path: Path, record_property: Observed) -> None:
    one, two = (disk.path for disk in vm.guest.disks)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    said = reasons(vm)
    assert said == "changed-unseen, changed-unseen"
    record_property("observed", said)
    vm.assert_survived()


@pytest.mark.fault("guest", "disk unplugged between backups")
def test_it_is_unplugged_and_plugged_in_again(vm: BackedUpVm, record_property: Observed) -> None:
    both = list(vm.guest.disks)
    vm.guest.disks = both[:1]
    vm.guest.domain = vm.guest.libvirtd.connection.defineXML(vm.guest.xml())
    without = reasons(vm)
    assert without == "increment"
    vm.guest.disks = both
    vm.guest.domain = vm.guest.libvirtd.connection.defineXML(vm.guest.xml())
    write(vm, "write -P 9 1M 64k", disk=1)
    again = reasons(vm)
    assert again.startswith("increment, ")
    record_property("observed", f"{without} without it; plugged in again {again}")
    vm.assert_survived()


@pytest.mark.fault("guest", "renamed between backups")
def test_it_is_renamed(vm: BackedUpVm, record_property: Observed) -> None:
    vm.guest.domain.rename(f"{vm.guest.name} again")
    vm.guest.name += " again"
    write(vm, "write -P 9 1M 64k")
    said = reasons(vm)
    assert said == "increment, increment"
    record_property("observed", said)
    vm.assert_survived()


SNAPSHOT = "<domainsnapshot><name>before</name></domainsnapshot>"


@pytest.mark.fault("change tracking", "internal snapshot made")
@pytest.mark.fault("change tracking", "reverted to an internal snapshot while it runs")
def test_it_is_reverted_while_it_runs(vm: BackedUpVm, record_property: Observed) -> None:
    vm.guest.start()
    assert reasons(vm) == "increment, increment"
    snapshot = vm.guest.domain.snapshotCreateXML(SNAPSHOT, 0)
    write(vm, "write -P 9 1M 64k")
    made = reasons(vm)
    write(vm, "write -P 10 3M 64k")
    assert made == "increment, increment"
    with pytest.raises(libvirt.libvirtError, match="Device has active dirty bitmaps"):
        vm.guest.domain.revertToSnapshot(snapshot, 0)
    vm.guest.start()  # QEMU has refused to start with the old state
    record_property("observed", f"increment after it was made; QEMU refuses the revert; then {reasons(vm)}")
    vm.assert_survived()


@pytest.mark.fault("change tracking", "reverted to an internal snapshot while off")
def test_it_is_reverted_while_off(vm: BackedUpVm, record_property: Observed) -> None:
    disk = str(vm.guest.disks[0].path)
    command("qemu-img", "snapshot", "-c", "before", disk)
    write(vm, "write -P 9 1M 64k")
    made = reasons(vm)
    assert made == "increment, increment"
    with pytest.raises(subprocess.CalledProcessError) as refused:
        command("qemu-img", "snapshot", "-a", "before", disk)
    assert "Device has active dirty bitmaps" in refused.value.stderr
    record_property("observed", f"refused by qemu-img as long as there are bitmaps; then {reasons(vm)}")
    vm.assert_survived()


@pytest.mark.fault("change tracking", "bitmap in use")
def test_somebody_else_reads_since_our_checkpoint(
    vm: BackedUpVm, tmp_path: Path, record_property: Observed
) -> None:
    vm.guest.start()
    point = vm.backup()
    theirs = [JobDisk("vda", tmp_path / "their.scratch", point.exports.checkpoint)]
    socket = vm.socket_dir.parent / "theirs.sock"
    vm.guest.domain.backupBegin(job_xml(socket, theirs, ["vdb"]), None, 0)
    with pytest.raises(Busy, match="somebody else"):
        vm.backup(fs_freeze="AGENT")
    assert vm.guest.has_backup_job()
    vm.guest.domain.abortJob()
    wait_for("end of the foreign job", lambda: not vm.guest.has_backup_job())
    write(vm, "write -P 9 1M 64k")
    record_property("observed", f"busy; then {reasons(vm)}")
    vm.assert_survived()


@pytest.mark.fault("guest", "disk being committed or copied by somebody else")
def test_a_disk_is_being_committed(vm: BackedUpVm, tmp_path: Path, record_property: Observed) -> None:
    vm.guest.start()
    overlay = f"<disk name='vda' snapshot='external'><source file='{tmp_path}/overlay'/></disk>"
    vm.guest.domain.snapshotCreateXML(
        f"<domainsnapshot><disks>{overlay}<disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    write(vm, "write -P 9 1M 64k")
    vm.guest.domain.blockCommit("vda", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
    with pytest.raises(Busy, match=r"vda of domain .* is being committed") as refused:
        vm.backup(fs_freeze="SUSPEND")
    vm.guest.domain.blockJobAbort("vda", 0)
    said = str(refused.value).replace(vm.guest.name, "…").splitlines()[0]
    record_property("observed", f"busy: {said}; then {reasons(vm)}")
    vm.assert_survived()


@pytest.mark.fault("change tracking", "bitmap of the new checkpoint's name is there already")
@pytest.mark.parametrize("running", [False, True])
def test_a_bitmap_of_the_next_name(vm: BackedUpVm, record_property: Observed, running: bool) -> None:
    name = checkpoint_name("0badcafe", "20260101-000000-000001")
    for disk in vm.guest.disks:
        command("qemu-img", "bitmap", "--add", "-f", "qcow2", str(disk.path), name)
    if running:
        vm.guest.start()
    write(vm, "write -P 9 1M 64k")
    said = reasons(vm)
    assert said == "increment, increment"
    record_property("observed", said)
    vm.assert_survived()


@pytest.mark.fault("guest", "disk plugged in in mid-transfer")
def test_a_disk_is_plugged_in_meanwhile(vm: BackedUpVm, tmp_path: Path, record_property: Observed) -> None:
    late = LabDisk(tmp_path / "late.qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", str(late.path), "16M")
    vm.guest.start()
    point = vm.backup(meanwhile=lambda: vm.guest.attach(late))
    assert len(point.exports.disks) == 2
    said = reasons(vm)
    assert said == "increment, increment, new-disk"
    record_property("observed", f"not in this backup; the next one: {said}")
    vm.assert_survived()


REFUSED: dict[str, Callable[[Any], object]] = {
    "unplug": lambda domain: domain.detachDevice(disk_xml(LabDisk(Path("/two.qcow2")), "vdb")),
    "grow": lambda domain: domain.blockResize("vdb", 32 * MIB, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES),
    "snapshot": lambda domain: domain.snapshotCreateXML(
        "<domainsnapshot/>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    ),
    "backup": lambda domain: domain.backupBegin("<domainbackup/>", None, 0),
}
SLOW = pytest.mark.whole_matrix  # libvirt waits for its lock for 30 s


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param("unplug", marks=pytest.mark.fault("guest", "disk unplugged in mid-transfer")),
        pytest.param("grow", marks=pytest.mark.fault("guest", "disk grown in mid-transfer")),
        pytest.param(
            "snapshot",
            marks=[SLOW, pytest.mark.fault("change tracking", "external snapshot in mid-transfer")],
        ),
        pytest.param(
            "backup",
            marks=[SLOW, pytest.mark.fault("concurrency", "two backups of one domain at the hypervisor")],
        ),
    ],
)
def test_what_libvirt_refuses_meanwhile(vm: BackedUpVm, record_property: Observed, attempt: str) -> None:
    said: list[str] = []

    def try_it() -> None:
        with pytest.raises(libvirt.libvirtError) as refused:
            REFUSED[attempt](vm.guest.domain)
        said.append(str(refused.value))

    vm.guest.start()
    vm.backup(meanwhile=try_it)
    record_property("observed", f"refused by libvirt: {said[0]}")
    vm.assert_survived()


@pytest.mark.fault("odd inputs", "paths with spaces, quotes, unicode")
def test_odd_names_and_paths(
    make_guest: Callable[..., Guest],
    back_up: Callable[[Guest], BackedUpVm],
    tmp_path: Path,
    record_property: Observed,
) -> None:
    folder = tmp_path / "-a b,c=d'e\"fü:%g\\h$(x)"
    folder.mkdir()
    disk = LabDisk(folder / "-d i'sk,ü.qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", str(disk.path), "16M")
    vm = back_up(make_guest([disk], start=False, boot="disk", agent=False))
    write(vm, "write -P 9 1M 64k")
    off = reasons(vm)
    vm.guest.start()
    write(vm, "write -P 9 3M 64k")
    record_property("observed", f"{off} while off, {reasons(vm)} while it runs")
    vm.assert_survived()


@pytest.mark.fault("odd inputs", "no disk that can be backed up")
def test_no_disk_is_left(vm: BackedUpVm, record_property: Observed) -> None:
    vm.config = BackupConfig(mode=Mode.INCREMENT, disk_ids=(7,))
    with pytest.raises(Misconfigured, match=r"no disk can be backed up: .*vda") as refused:
        vm.backup()
    record_property("observed", f"{type(refused.value).__name__}: {refused.value}")
    vm.assert_nothing_left("op-000000000001")
    vm.config = BackupConfig(mode=Mode.INCREMENT)
    vm.assert_survived()


@pytest.mark.fault("host", "hypervisor unreachable before the freeze")
@pytest.mark.fault("host", "libvirtd restarted between backups")
@pytest.mark.fault("host", "host rebooted")
def test_libvirtd_dies_and_then_the_host(short_dir: Path, record_property: Observed) -> None:
    folder = short_dir / "guest"
    folder.mkdir()
    disk = LabDisk(folder / "one.qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", str(disk.path), "16M")
    with Libvirtd() as server:
        vm = BackedUpVm(
            Guest(server, folder, "alone", [disk], boot="disk", agent=False), folder, short_dir / "s"
        )
        vm.guest.start()
        vm.backup()
        known = vm.document()
        server.kill()
        lost = folder / "lost"
        lost.mkdir()
        vm.document = lambda: known  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="libvirt at") as refused:
            vm.tm("pre_backup_live", vm.next_backup(), files=lost, operation_id="op-00000000dead")
        assert not vm.socket_dir.exists() or list(vm.socket_dir.iterdir()) == []
        said = f"{type(refused.value).__name__}: {str(refused.value).replace(str(server.directory), '…')}"
        record_property("observed", ["hypervisor unreachable before the freeze", said])
        del vm.document
        server.resume()
        vm.guest.domain = server.connection.lookupByName("alone")
        write(vm, "write -P 9 1M 64k")
        restarted = reasons(vm)
        assert restarted == "increment"
        server.kill()
        os.kill(vm.guest.pid, signal.SIGKILL)
        server.restart()
        vm.guest.domain = server.connection.lookupByName("alone")
        record_property("observed", ["libvirtd restarted between backups", restarted])
        record_property("observed", ["host rebooted", reasons(vm)])
        vm.assert_survived()
        vm.guest.destroy()


@pytest.mark.fault("guest", "put on another backing image while off")
@pytest.mark.parametrize("running", [pytest.param(False, marks=pytest.mark.whole_matrix), True])
def test_it_is_put_on_another_backing_image(
    make_guest: Callable[..., Guest],
    back_up: Callable[[Guest], BackedUpVm],
    tmp_path: Path,
    record_property: Observed,
    running: bool,
) -> None:
    bases = [tmp_path / "base", tmp_path / "other"]
    for base, filled in zip(
        bases, ("64k", "128k"), strict=True
    ):  # alike but for one cluster, which no sample has
        command("qemu-img", "create", "-q", "-f", "qcow2", str(base), "16M")
        command("qemu-io", "-f", "qcow2", "-c", f"write -P 9 512k {filled}", str(base))
    disk = LabDisk(tmp_path / "one.qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(bases[0]), "-F", "qcow2", str(disk.path))
    vm = back_up(make_guest([disk], start=False, boot="disk", agent=False))
    if running:
        vm.guest.start()
    assert reasons(vm) == "first-backup"
    if running:
        vm.guest.end()
    command("qemu-img", "rebase", "-u", "-b", str(bases[1]), "-F", "qcow2", str(disk.path))
    if running:
        vm.guest.start()
    said = reasons(vm)
    assert said == "disk-replaced"
    record_property("observed", f"{said}: {vm.points[-1].disk('vda').text.replace(str(tmp_path), '…')}")
    vm.assert_survived()
