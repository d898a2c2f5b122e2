"""What the watchman of a backup does when nobody else can, and a job that does not end at once."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libvirt
import libvirt_qemu
import pytest
from backed_up_vm import BackedUpVm, command, processes
from lab import Guest, LabDisk, wait_for

from oned_backup.contract.request import Outcome
from oned_backup.transfer import guard

pytestmark = [pytest.mark.guest, pytest.mark.whole_matrix]

OPERATION = "op-00000000dead"


@pytest.fixture
def vm(
    make_guest: Callable[..., Guest], back_up: Callable[[Guest], BackedUpVm], tmp_path: Path
) -> BackedUpVm:
    """A VM with one disk that is off, backed up once."""
    disk = LabDisk(tmp_path / "one.qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", str(disk.path), "16M")
    vm = back_up(make_guest([disk], start=False, boot="disk", agent=False))
    vm.backup()
    return vm


@pytest.fixture
def begun(vm: BackedUpVm) -> Callable[..., Callable[[], None]]:
    """Begin a backup that nobody ends; what this gives does."""
    files = vm.directory / "lost"
    files.mkdir()
    place: dict[str, Any] = {"files": files, "operation_id": OPERATION}

    def begin(**options: str) -> Callable[[], None]:
        backup = vm.next_backup()
        action = "backup_live" if vm.guest.is_active() else "backup"
        vm.tm(f"pre_{action}", backup, **place, **options)
        keep = vm.points[-1].exports.checkpoint
        return lambda: (
            vm.tm(f"post_{action}", backup, **place, **options, outcome=Outcome.FAILURE, KEEP_CHECKPOINT=keep)
            and None
        )

    return begin


@pytest.mark.fault("daemon", "daemon killed and never started again")
@pytest.mark.parametrize("running", [False, True])
def test_a_daemon_that_never_comes_back(
    vm: BackedUpVm, begun: Callable[..., Callable[[], None]], running: bool
) -> None:
    if running:
        vm.guest.start()
    end = begun()
    with subprocess.Popen(["sleep", "600"]) as died:
        daemon = guard.Daemon(os.pidfd_open(died.pid), lost_s=0.5)
        directory = vm.socket_dir / OPERATION
        watchman = threading.Thread(
            target=guard.watch,
            args=(daemon, vm.guest.uri, vm.guest.uuid if running else "", directory, directory, vm.directory),
        )
        watchman.start()
        watchman.join(2)
        assert watchman.is_alive(), "the daemon lives, and all is well"
        died.kill()
        watchman.join(30)
    assert not watchman.is_alive()
    if not running:
        vm.guest.start()  # nobody holds its disk
    assert not vm.guest.has_backup_job()
    assert list(vm.socket_dir.iterdir()) == []
    assert list(vm.directory.glob(f".oned-backup-{OPERATION}*")) == []
    wait_for("end of all processes", lambda: not processes(vm.socket_dir), 10)
    vm.guest.end()
    end()  # a daemon after all
    vm.assert_nothing_left(OPERATION)
    vm.assert_survived()


@pytest.mark.fault("host", "file system of the scratch breaks in mid-transfer")
def test_scratch_that_cannot_be_looked_at_ends_the_backup(
    vm: BackedUpVm, begun: Callable[..., Callable[[], None]], tmp_path: Path
) -> None:
    vm.guest.start()
    scratch = tmp_path / "scratch"
    end = begun(SCRATCH_DIR=str(scratch))
    scratch.rename(tmp_path / "gone")
    wait_for("end of the job", lambda: not vm.guest.has_backup_job(), 30)
    end()
    assert any("does not answer" in line for line in vm.log)
    vm.assert_survived()


@pytest.mark.fault("host", "QEMU answers nobody for longer than libvirt waits, at the end of a backup")
def test_a_job_whose_end_libvirt_refuses_is_ended_later(
    vm: BackedUpVm, begun: Callable[..., Callable[[], None]]
) -> None:
    vm.guest.start()
    end = begun()
    domain = libvirt.open(vm.guest.uri).lookupByName(vm.guest.name)
    query = '{"execute":"query-status"}'
    somebody = threading.Thread(target=libvirt_qemu.qemuMonitorCommand, args=(domain, query, 0))
    os.kill(vm.guest.pid, signal.SIGSTOP)
    goes_on = threading.Timer(33, os.kill, (vm.guest.pid, signal.SIGCONT))
    goes_on.start()
    try:
        somebody.start()
        end()
    finally:
        goes_on.join()
        somebody.join()
    assert not vm.guest.has_backup_job()
    vm.assert_survived()
