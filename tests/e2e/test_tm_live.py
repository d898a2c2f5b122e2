"""tm/qcow2 on a running guest: every restore point is exactly what QEMU saw at that instant."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import libvirt
import pytest
from backed_up_vm import INSTALLATION, BackedUpVm, RestorePoint, command, new_file, processes
from lab import Guest, Libvirtd, cdrom, data_disk, root_disk, wait_for

from oned_backup import xmldoc
from oned_backup.contract.exports import Exports
from oned_backup.contract.request import Outcome
from oned_backup.disk.image import open_export
from oned_backup.errors import Busy, NoSpace, OnedBackupError, PermissionDenied
from oned_backup.hypervisor.backup_job import JobDisk, job_xml
from oned_backup.runner.run import Limits

pytestmark = pytest.mark.guest

BackUp = Callable[[Guest], BackedUpVm]


@pytest.fixture(scope="module")
def shared_guest(libvirtd: Libvirtd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A running guest for the tests that leave it as it was: two qcow2 disks, a CD-ROM, a raw disk."""
    directory = tmp_path_factory.mktemp("shared")
    disks = [root_disk(directory), data_disk(directory, 64), cdrom()]
    disks.append(data_disk(directory, 16, name="raw", disk_format="raw"))
    guest = Guest(libvirtd, directory, "shared", disks)
    guest.start()
    guest.wait_ready()
    yield guest
    guest.destroy()


@pytest.fixture
def vm(shared_guest: Guest, back_up: BackUp) -> BackedUpVm:
    return back_up(shared_guest)


def test_chain_of_three_disks_while_the_guest_writes_and_trims(vm: BackedUpVm) -> None:
    guest = vm.guest
    new_file(guest, "/data/vdb/a", 8)

    full = vm.backup(meanwhile=lambda: new_file(guest, "/data/vdb/b", 4))
    assert {disk.target: disk.reason.value for disk in full.exports.disks} == {
        "vda": "first-backup",
        "vdb": "first-backup",
        "vdd": "first-backup",
    }
    assert full.excluded() == {"hdc": "cdrom"}
    assert full.exports.increment_id == 0
    for target in ("vda", "vdb", "vdd"):
        vm.assert_restores(target)

    for number in (1, 2):
        guest.shell(f"rm /data/vdb/a; fstrim /data/vdb; echo {number} >/root/x; sync")
        new_file(guest, "/data/vdb/a", 3)
        point = vm.backup(
            meanwhile=lambda: guest.shell("rm /data/vdb/a; fstrim /data/vdb; touch /data/vdb/a")
        )
        assert point.reason("vda") == point.reason("vdb") == "increment"
        assert point.reason("vdd") == "no-change-tracking"
        assert point.exports.increment_id == number
        assert (point.files / f"disk.1.{number}").stat().st_size < 8 << 20
        for target in ("vda", "vdb", "vdd"):
            vm.assert_restores(target)
    assert vm.checkpoints() == [point.exports.checkpoint]


def test_agent_freezes_and_thaws_within_the_window(vm: BackedUpVm) -> None:
    guest = vm.guest
    guest.shell(": >/run/fsfreeze.log")
    point = vm.backup(fs_freeze="AGENT")
    assert point.exports.freeze.method == "AGENT"
    assert 0 < point.exports.freeze.window_ms < 10_000
    assert point.exports.freeze.warning == ""
    assert [line.split()[0] for line in guest.run("cat", "/run/fsfreeze.log").splitlines()] == [
        "freeze",
        "thaw",
    ]
    assert guest.agent("guest-fsfreeze-status") == "thawed"


def test_suspended_for_the_instant_only(vm: BackedUpVm) -> None:
    point = vm.backup(fs_freeze="SUSPEND")
    assert point.exports.freeze.method == "SUSPEND"
    assert not vm.guest.is_paused()


@pytest.mark.parametrize("fs_freeze", ["SUSPEND", "AGENT"])
@pytest.mark.fault("guest", "paused by somebody else")
def test_guest_that_was_paused_stays_paused(vm: BackedUpVm, fs_freeze: str) -> None:
    vm.guest.suspend()
    try:
        point = vm.backup(fs_freeze=fs_freeze)
        assert vm.guest.is_paused()
        assert point.exports.freeze.method == "NONE"
        assert "paused" in point.exports.freeze.warning
    finally:
        vm.guest.resume()


def test_frozen_guest_is_thawed_when_the_job_cannot_begin(vm: BackedUpVm, tmp_path: Path) -> None:
    guest = vm.guest
    vm.backup()
    guest.shell(": >/run/fsfreeze.log")
    good, vm.socket_dir = vm.socket_dir, tmp_path / ("too-long-for-a-socket-" + "x" * 80)
    with pytest.raises(OnedBackupError, match="backup of domain"):
        vm.backup(fs_freeze="AGENT")
    assert guest.run("cat", "/run/fsfreeze.log").split()[::2] == ["freeze", "thaw"]
    assert guest.agent("guest-fsfreeze-status") == "thawed"
    vm.assert_nothing_left("op-000000000001")
    vm.socket_dir = good
    assert vm.backup().reason("vda") == "increment"
    vm.assert_restores("vda")


@pytest.mark.fault("change tracking", "checkpoint of a failed backup")
def test_what_a_killed_pre_backup_left_is_removed_and_the_chain_goes_on(vm: BackedUpVm) -> None:
    vm.backup()
    backup = vm.next_backup()
    lost = vm.directory / "lost"
    lost.mkdir()
    vm.tm("pre_backup_live", backup, files=lost, operation_id="op-00000000dead")
    assert vm.guest.has_backup_job()
    for _ in range(2):
        vm.tm(
            "post_backup_live",
            backup,
            files=lost,
            operation_id="op-00000000dead",
            outcome=Outcome.FAILURE,
            KEEP_CHECKPOINT=vm.points[-1].exports.checkpoint,
        )
        vm.assert_nothing_left("op-00000000dead")
    assert vm.checkpoints() == [vm.points[-1].exports.checkpoint]
    new_file(vm.guest, "/root/y", 1)
    assert vm.backup().reason("vda") == "increment"
    vm.assert_restores("vda")


@pytest.mark.fault("concurrency", "the same backup id again")
def test_same_backup_id_again_after_nobody_cleaned_up(vm: BackedUpVm) -> None:
    vm.backup()
    backup = vm.next_backup()
    lost = vm.directory / "lost"
    lost.mkdir()
    for _ in range(2):
        answer = vm.tm("pre_backup_live", backup, files=lost, operation_id="op-00000000beef")
        assert xmldoc.text(xmldoc.parse(answer["EXPORTS"]), "DISK/TYPE") == "INCREMENT"
    vm.tm(
        "post_backup_live",
        backup,
        files=lost,
        operation_id="op-00000000beef",
        outcome=Outcome.CANCELLED,
        KEEP_CHECKPOINT=vm.points[-1].exports.checkpoint,
    )
    vm.assert_nothing_left("op-00000000beef")


@pytest.mark.fault("change tracking", "foreign bitmaps and checkpoints")
@pytest.mark.fault("change tracking", "foreign backup job")
def test_checkpoints_and_jobs_of_others_are_not_touched(vm: BackedUpVm, tmp_path: Path) -> None:
    domain = vm.guest.domain
    disks = "<disks><disk name='vda' checkpoint='bitmap'/><disk name='vdd' checkpoint='no'/></disks>"
    domain.checkpointCreateXML(f"<domaincheckpoint><name>theirs</name>{disks}</domaincheckpoint>", 0)
    other = f"odb-{'f' * 8}-20260101-000000-000000"
    domain.checkpointCreateXML(f"<domaincheckpoint><name>{other}</name>{disks}</domaincheckpoint>", 0)
    try:
        point = vm.backup()
        assert vm.checkpoints() == sorted(["theirs", other, point.exports.checkpoint])

        socket = vm.socket_dir.parent / "theirs.sock"
        theirs = JobDisk("vda", tmp_path / "their.scratch")
        socket = vm.socket_dir.parent / "theirs.sock"
        domain.backupBegin(job_xml(socket, [theirs], ["vdb", "hdc", "vdd"]), None, 0)
        with pytest.raises(Busy, match="somebody else"):
            vm.backup(fs_freeze="AGENT")
        vm.vmm("abort_backup", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
        assert vm.guest.has_backup_job()
    finally:
        if vm.guest.has_backup_job():
            domain.abortJob()
            wait_for("end of the foreign job", lambda: not vm.guest.has_backup_job())
        for name in ("theirs", other):
            domain.checkpointLookupByName(name).delete(0)


@pytest.mark.fault("change tracking", "checkpoint without bitmap")
@pytest.mark.fault("change tracking", "bitmap without checkpoint")
def test_lost_metadata_is_redefined_and_a_lost_bitmap_makes_that_disk_full(vm: BackedUpVm) -> None:
    point = vm.backup()
    domain = vm.guest.domain
    domain.checkpointLookupByName(point.exports.checkpoint).delete(
        libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY
    )
    new_file(vm.guest, "/root/z", 1)
    point = vm.backup()
    assert point.reason("vda") == "increment"
    vm.assert_restores("vda")

    # the bitmap of one disk goes: redefine the checkpoint for that disk alone, and delete it
    name = point.exports.checkpoint
    domain.checkpointCreateXML(
        f"<domaincheckpoint><name>{name}</name><creationTime>1</creationTime>"
        f"<disks><disk name='vdb' checkpoint='bitmap' bitmap='{name}'/></disks></domaincheckpoint>",
        libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE,
    )
    domain.checkpointLookupByName(name).delete(0)
    new_file(vm.guest, "/data/vdb/z", 1)
    point = vm.backup()
    assert point.reason("vda") == "increment"
    assert point.reason("vdb") == "bitmap-missing"
    assert point.exports.increment_id == 2
    for target in ("vda", "vdb"):
        vm.assert_restores(target)


def test_staged_files_are_the_same_backup(vm: BackedUpVm) -> None:
    vm.backup(transfer="staged")
    new_file(vm.guest, "/root/staged", 1)
    point = vm.backup(transfer="staged")
    assert point.reason("vda") == "increment"
    assert point.disk("vda").path == str(point.files / "disk.0.1")
    assert point.disk("vda").nbd_socket == ""
    for target in ("vda", "vdb", "vdd"):
        vm.assert_restores(target)


@pytest.mark.fault("guest", "disk plugged in between backups")
@pytest.mark.fault("change tracking", "external snapshot by somebody else")
@pytest.mark.fault("change tracking", "overlay committed")
def test_disk_plugged_in_and_external_snapshot_in_mid_chain(
    make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path
) -> None:
    guest = make_guest()
    vm = back_up(guest)
    vm.backup()
    guest.attach(data_disk(tmp_path, 16, name="late"))
    point = vm.backup()
    assert (point.reason("vda"), point.reason("vdb")) == ("increment", "new-disk")
    assert point.exports.increment_id == 1
    guest.shell("until [ -b /dev/vdb ]; do sleep 0.1; done; echo x >/dev/vdb; sync")
    point = vm.backup()
    assert (point.reason("vda"), point.reason("vdb")) == ("increment", "increment")

    overlay = tmp_path / "overlay.qcow2"
    guest.domain.snapshotCreateXML(
        "<domainsnapshot><disks><disk name='vda' snapshot='external'>"
        f"<source file='{overlay}'/></disk><disk name='vdb' snapshot='no'/></disks></domainsnapshot>",
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA,
    )
    new_file(guest, "/root/on-overlay", 2)
    point = vm.backup()
    assert point.reason("vda") == "increment"
    assert point.disk("vda").source == str(overlay)
    assert point.disk("vda").backing == (str(tmp_path / "root.qcow2"),)
    for target in ("vda", "vdb"):
        vm.assert_restores(target)

    guest.commit("vda")
    new_file(guest, "/root/committed", 1)
    point = vm.backup()
    assert point.reason("vda") == "increment"
    assert point.disk("vda").source == str(tmp_path / "root.qcow2")
    vm.assert_restores("vda")


@pytest.fixture
def blank_guest(make_guest: Callable[..., Guest], tmp_path: Path) -> Guest:
    """A running domain without an operating system and without an agent's channel."""
    guest = make_guest([data_disk(tmp_path, 16)], start=False, boot="disk", agent=False)
    guest.start()
    return guest


@pytest.mark.fault("guest", "agent absent")
def test_guest_without_agent_is_backed_up_with_a_warning(blank_guest: Guest, back_up: BackUp) -> None:
    vm = back_up(blank_guest)
    point = vm.backup(fs_freeze="AGENT")
    assert point.exports.freeze.method == "NONE"
    assert "agent is not connected" in point.exports.freeze.warning
    assert any("agent is not connected" in line for line in vm.log)


@pytest.mark.fault("guest", "agent hung")
def test_hung_agent_costs_no_more_than_the_limit(guest: Guest, back_up: BackUp) -> None:
    vm = back_up(guest)
    guest.shell("(sleep 0.2; killall -STOP qemu-ga) >/dev/null 2>&1 </dev/null &")
    wait_for("hang of the agent", lambda: not guest._agent_answers())
    point = vm.backup(fs_freeze="AGENT", FREEZE_TIMEOUT_S="2")
    assert point.exports.freeze.method == "NONE"
    assert "no freeze" in point.exports.freeze.warning


@pytest.mark.fault("guest", "frozen by somebody else")
def test_guest_that_somebody_else_has_frozen_stays_frozen(
    vm: BackedUpVm, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    vm.backup()
    domain = vm.guest.domain
    vm.guest.agent("guest-fsfreeze-freeze")
    try:
        point = vm.backup(fs_freeze="AGENT")
        assert _is_frozen(vm.guest)
        assert point.exports.freeze.method == "NONE"
        record_property("observed", f"stays frozen; {point.exports.freeze.warning}")
        # they begin a backup: ours fails, and what the daemon does then is nothing to them
        socket = vm.socket_dir.parent / "theirs.sock"
        theirs = [JobDisk("vda", tmp_path / "their.scratch")]
        domain.backupBegin(job_xml(socket, theirs, ["vdb", "hdc", "vdd"]), None, 0)
        with pytest.raises(Busy, match="somebody else"):
            vm.backup(fs_freeze="AGENT")
        for action in ("thaw", "abort_backup"):
            vm.vmm(action, DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
        assert _is_frozen(vm.guest)
        assert vm.guest.has_backup_job()
    finally:
        vm.guest.agent("guest-fsfreeze-thaw")
        if vm.guest.has_backup_job():
            domain.abortJob()
            wait_for("end of the foreign job", lambda: not vm.guest.has_backup_job())
    assert vm.backup().reason("vda") == "increment"
    vm.assert_restores("vda")


def test_guest_that_a_dead_attempt_of_ours_has_frozen_is_thawed(vm: BackedUpVm) -> None:
    note = vm.socket_dir / "op-00000000dead" / "frozen"
    note.parent.mkdir(parents=True)
    note.write_text("another guest")
    vm.guest.agent("guest-fsfreeze-freeze")
    try:
        vm.vmm("thaw", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
        assert _is_frozen(vm.guest)
        note.write_text(vm.guest.uuid)
        vm.vmm("thaw", DOMAIN=vm.guest.uuid, SOCKET_DIR=str(vm.socket_dir))
        assert not _is_frozen(vm.guest)
        assert not note.exists()
        vm.guest.agent("guest-fsfreeze-freeze")
        note.write_text(vm.guest.uuid)  # and nobody has cleaned up before the next backup
        backup = vm.next_backup()
        lost = vm.directory / "lost"
        lost.mkdir()
        place = {"files": lost, "operation_id": "op-00000000beef"}
        vm.tm("pre_backup_live", backup, **place)
        assert not _is_frozen(vm.guest)
        vm.tm("post_backup_live", backup, **place, outcome=Outcome.FAILURE)
    finally:
        note.unlink(missing_ok=True)
        note.parent.rmdir()
        vm.guest.agent("guest-fsfreeze-thaw")
    vm.assert_nothing_left("op-00000000beef")


@pytest.mark.fault("guest", "freeze longer than the limit")
def test_freeze_that_takes_longer_than_the_limit_is_thawed_when_it_is_done(
    guest: Guest, back_up: BackUp
) -> None:
    hook = "/etc/qemu/fsfreeze-hook.d/slow"
    guest.write_file(hook, b'#!/bin/sh\n[ "$1" = thaw ] || sleep 10\n')
    guest.shell(f"chmod 755 {hook}")
    vm = back_up(guest)
    point = vm.backup(fs_freeze="AGENT", FREEZE_TIMEOUT_S="1")
    assert point.exports.freeze.method == "NONE"
    assert "repeated" in point.exports.freeze.warning
    # deaf until it has frozen the guest
    wait_for("thaw of the guest", lambda: guest._agent_answers() and not _is_frozen(guest), timeout_s=30)


def _is_frozen(guest: Guest) -> bool:
    return bool(guest.agent("guest-fsfreeze-status") == "frozen")


@pytest.mark.fault("host", "QEMU under another user")
def test_qemu_of_another_user(short_dir: Path) -> None:
    directory = short_dir / "guest"
    directory.mkdir()
    with Libvirtd(qemu_user="libvirt-qemu") as server:
        guest = Guest(server, directory, "unprivileged", [data_disk(directory, 16)], boot="disk", agent=False)
        guest.start()
        assert Path(f"/proc/{guest.pid}").stat().st_uid != 0
        vm = BackedUpVm(guest, directory, short_dir / "s")
        writable: list[str] = []
        vm.backup(meanwhile=lambda: writable.extend(_not_ours(vm.socket_dir)))
        assert set(writable) == {"qemu", "nbd.sock"}  # nothing that we believe or write
        vm.assert_restores("vda")
        secret = short_dir / "secret"
        secret.mkdir(mode=0o700)
        with pytest.raises(PermissionDenied, match=r"secret.*AppArmor"):
            vm.backup(SCRATCH_DIR=str(secret))
        assert list(secret.iterdir()) == []
        for change in (guest.end, guest.start):
            change()
            assert vm.backup().reason("vda") == "increment"
            vm.assert_restores("vda")
        guest.destroy()


def _not_ours(directory: Path) -> list[str]:
    return [path.name for path in directory.rglob("*") if path.stat().st_uid != os.geteuid()]


def test_scratch_is_where_it_was_asked_for(blank_guest: Guest, back_up: BackUp, tmp_path: Path) -> None:
    vm = back_up(blank_guest)
    scratch = tmp_path / "scratch"
    seen: list[str] = []
    point: RestorePoint = vm.backup(
        SCRATCH_DIR=str(scratch), meanwhile=lambda: seen.extend(path.name for path in scratch.iterdir())
    )
    assert seen == [".oned-backup-op-000000000000-vda.scratch"]
    assert list(scratch.iterdir()) == []
    assert point.exports.checkpoint.startswith(f"odb-{INSTALLATION}-")


@pytest.mark.fault("host", "scratch full in mid-transfer")
def test_full_scratch_ends_the_backup_and_not_the_guest(
    make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path
) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64)])
    vm = back_up(guest)
    new_file(guest, "/data/vdb/a", 20)
    vm.backup()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # only QEMU sees this file system, so that it fills before the watchman's limit is reached
    inside = ["nsenter", "--mount", "--root", f"--target={guest.pid}"]
    command(*inside, "mount", "-t", "tmpfs", "-o", "size=2m", "scratch", str(scratch))
    backup = vm.next_backup()
    lost = vm.directory / "lost"
    lost.mkdir()
    place = {"files": lost, "operation_id": "op-00000000dead", "SCRATCH_DIR": str(scratch)}
    answer = vm.tm("pre_backup_live", backup, **place)
    disk = Exports.from_xml(xmldoc.parse(answer["EXPORTS"])).disks[1]
    with open_export(disk.nbd_socket, disk.nbd_export, dirty_bitmap=disk.dirty_bitmap):
        overwrite = "dd if=/dev/urandom of=/data/vdb/a bs=1M count=20 conv=notrunc,fsync"
        guest.shell(f"({overwrite}; touch /run/done) </dev/null >/dev/null 2>&1 &")
        wait_for("end of the job", lambda: not guest.has_backup_job())
    # QEMU had stopped it when its write to the scratch file failed
    wait_for("running guest", lambda: not guest.is_paused())
    wait_for("end of the guest's write", lambda: "done" in guest.run("ls", "/run"))
    keep = vm.points[-1].exports.checkpoint
    vm.tm("post_backup_live", backup, **place, outcome=Outcome.FAILURE, KEEP_CHECKPOINT=keep)
    assert any("I/O error" in line for line in vm.log)
    command(*inside, "umount", str(scratch))
    vm.assert_nothing_left("op-00000000dead")
    assert vm.backup().reason("vdb") == "increment"
    vm.assert_restores("vdb")


@pytest.mark.whole_matrix
@pytest.mark.fault("host", "scratch full when daemon and watchman are dead")
def test_full_scratch_that_nobody_has_seen(
    make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path
) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64)])
    vm = back_up(guest)
    new_file(guest, "/data/vdb/a", 20)
    vm.backup()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    inside = ["nsenter", "--mount", "--root", f"--target={guest.pid}"]
    command(*inside, "mount", "-t", "tmpfs", "-o", "size=2m", "scratch", str(scratch))
    backup = vm.next_backup()
    lost = vm.directory / "lost"
    lost.mkdir()
    place = {"files": lost, "operation_id": "op-00000000dead", "SCRATCH_DIR": str(scratch)}
    vm.tm("pre_backup_live", backup, **place)
    pid_file = vm.socket_dir / "op-00000000dead" / "guard.pid"
    wait_for("the watchman", lambda: pid_file.exists() and pid_file.read_text())
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    overwrite = "dd if=/dev/urandom of=/data/vdb/a bs=1M count=20 conv=notrunc,fsync"
    guest.shell(f"({overwrite}; touch /run/done) </dev/null >/dev/null 2>&1 &")
    wait_for("the guest to be stopped", guest.is_paused)
    # what a daemon that comes back does first
    vm.vmm("abort_backup", DOMAIN=guest.uuid, SOCKET_DIR=str(vm.socket_dir), INSTALLATION=INSTALLATION)
    wait_for("running guest", lambda: not guest.is_paused(), 10)
    wait_for("end of the guest's write", lambda: "done" in guest.run("ls", "/run"))
    keep = vm.points[-1].exports.checkpoint
    vm.tm("post_backup_live", backup, **place, outcome=Outcome.FAILURE, KEEP_CHECKPOINT=keep)
    command(*inside, "umount", str(scratch))
    vm.assert_nothing_left("op-00000000dead")
    assert vm.backup().reason("vdb") == "increment"
    vm.assert_restores("vdb")


def watchmans_connections(vm: BackedUpVm) -> set[str]:
    """The unix sockets by which the watchman of the VM's only backup is connected, by inode."""
    pid = "".join(file.read_text() for file in vm.socket_dir.rglob("guard.pid")).strip()
    if not pid:
        return set()
    links = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.add(str(link.readlink()))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()]
    return {row[6] for row in rows if row[5] == "03" and f"socket:[{row[6]}]" in links}


@pytest.mark.fault("host", "libvirtd restarted in mid-transfer")
def test_watchman_outlives_a_restart_of_libvirtd(short_dir: Path) -> None:
    directory = short_dir / "guest"
    (directory / "lost").mkdir(parents=True)
    with Libvirtd() as server:
        guest = Guest(server, directory, "watched", [data_disk(directory, 16)], boot="disk", agent=False)
        guest.start()
        vm = BackedUpVm(guest, directory, short_dir / "s")
        backup = vm.next_backup()
        place = {"files": directory / "lost", "operation_id": "op-00000000dead"}
        vm.tm("pre_backup_live", backup, **place)
        before = wait_for("the watchman's connection", lambda: watchmans_connections(vm))
        server.kill()
        server.resume()
        wait_for("the watchman's next connection", lambda: watchmans_connections(vm) - before)
        guest.domain = server.connection.lookupByName(guest.name)
        assert guest.has_backup_job()
        assert len(processes(vm.socket_dir)) == 1
        vm.tm("post_backup_live", backup, **place, outcome=Outcome.FAILURE)
        vm.assert_nothing_left("op-00000000dead")
        guest.destroy()


@pytest.mark.fault("guest", "suspended by an attempt that was killed")
def test_guest_that_a_killed_attempt_has_suspended_goes_on(blank_guest: Guest, back_up: BackUp) -> None:
    vm = back_up(blank_guest)
    operation_dir = vm.socket_dir / "op-00000000dead"
    operation_dir.mkdir(parents=True)
    (operation_dir / "suspended").write_text(blank_guest.uuid)  # what it leaves: this, and
    blank_guest.suspend()
    lost = vm.directory / "lost"
    lost.mkdir()
    place = {"files": lost, "operation_id": "op-00000000dead"}
    backup = vm.next_backup()
    vm.tm("pre_backup_live", backup, **place)  # again, and nobody has cleaned up
    assert not blank_guest.is_paused()
    vm.tm("post_backup_live", backup, **place, outcome=Outcome.FAILURE)


@pytest.mark.fault("host", "too little scratch at the start")
def test_scratch_space_is_required_before_the_guest_is_frozen(
    blank_guest: Guest, back_up: BackUp, tmp_path: Path
) -> None:
    vm = back_up(blank_guest)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command("mount", "-t", "tmpfs", "-o", "size=2m", "scratch", str(scratch))
    try:
        with pytest.raises(NoSpace, match="256 MB needed, 2 MB free"):
            vm.backup(SCRATCH_DIR=str(scratch))
    finally:
        command("umount", str(scratch))
    vm.assert_nothing_left("op-000000000000")


def test_killed_at_any_moment_leaves_a_running_guest_and_the_chain(vm: BackedUpVm) -> None:
    vm.backup()
    keep = vm.points[-1].exports.checkpoint
    for number, delay_s in enumerate((0.2, 0.3, 0.4, 0.5, 0.7)):
        backup = vm.next_backup()
        operation_id = f"op-0000000dead{number}"
        lost = vm.directory / operation_id
        lost.mkdir()
        with contextlib.suppress(OnedBackupError):  # it may be faster
            vm.tm(
                "pre_backup_live",
                backup,
                files=lost,
                operation_id=operation_id,
                limits=Limits(deadline_s=delay_s, grace_s=0),
            )
        vm.tm(
            "post_backup_live",
            backup,
            files=lost,
            operation_id=operation_id,
            outcome=Outcome.FAILURE,
            KEEP_CHECKPOINT=keep,
        )
        vm.assert_nothing_left(operation_id)
        assert vm.checkpoints() == [keep]
    assert vm.backup().reason("vda") == "increment"
    vm.assert_restores("vda")
