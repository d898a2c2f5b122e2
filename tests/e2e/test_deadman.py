"""The shell that protects a guest on a host whose link is dead; here it runs beside its libvirtd."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Guest, data_disk, root_disk, wait_for

from oned_backup.transfer import deadman

pytestmark = pytest.mark.guest

PREFIX = ".oned-backup-op-0-"


@pytest.fixture
def protect(short_dir: Path) -> Iterator[Callable[..., Path]]:
    """Start it for a guest; the operation's directory."""
    directory = short_dir / "op-0"

    def start(guest: Guest, *folders: Path, freeze_s: float = 600, lost_s: float = 600) -> Path:
        directory.mkdir()
        (directory / "alive").touch()
        argv = deadman.arguments(
            directory, guest.uuid, guest.uri, PREFIX, folders, freeze_s=freeze_s, lost_s=lost_s
        )
        subprocess.run(argv, check=True, timeout=10)
        return directory

    yield start
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    wait_for("its end", lambda: not running(directory), 60)


def running(directory: Path) -> bool:
    listed = subprocess.run(["ps", "-ewwo", "args"], check=True, capture_output=True, text=True).stdout
    return any(str(directory) in line and "alive" in line for line in listed.splitlines())


def is_frozen(guest: Guest) -> bool:
    return bool(guest.agent("guest-fsfreeze-status") == "frozen")


def test_a_guest_that_stays_frozen_is_thawed(guest: Guest, protect: Callable[..., Path]) -> None:
    directory = protect(guest, freeze_s=0)
    guest.agent("guest-fsfreeze-freeze")
    assert is_frozen(guest)
    (directory / "frozen").touch()
    wait_for("thaw", lambda: not is_frozen(guest), 60)
    assert not (directory / "frozen").exists()


def test_a_guest_that_stays_suspended_goes_on(guest: Guest, protect: Callable[..., Path]) -> None:
    directory = protect(guest, freeze_s=0)
    guest.suspend()
    (directory / "suspended").touch()
    (directory / "frozen").touch()
    wait_for("the guest to go on", lambda: not guest.is_paused(), 60)


def test_when_nobody_is_left_the_job_ends_and_all_goes(
    make_guest: Callable[..., Guest],
    protect: Callable[..., Path],
    tmp_path: Path,
) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 16)])
    directory = protect(guest, tmp_path, lost_s=3600)
    xml = f"""<domainbackup mode='pull'><server transport='unix' socket='{directory}/nbd.sock'/>
      <disks><disk name='vda' backup='yes' type='file'><scratch file='{tmp_path}/{PREFIX}vda.scratch'/></disk>
      <disk name='vdb' backup='no'/></disks></domainbackup>"""
    guest.domain.backupBegin(xml, None, 0)
    assert guest.has_backup_job()
    os.utime(directory / "alive", (0, 0))
    wait_for("end of the job", lambda: not guest.has_backup_job(), 60)
    wait_for("removal", lambda: not directory.exists(), 60)
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def test_a_job_of_somebody_else_is_left_alone(
    guest: Guest, protect: Callable[..., Path], short_dir: Path, tmp_path: Path
) -> None:
    xml = f"""<domainbackup mode='pull'><server transport='unix' socket='{short_dir}/other.sock'/>
      <disks><disk name='vda' backup='yes' type='file'><scratch file='{tmp_path}/other.scratch'/></disk>
      </disks></domainbackup>"""
    guest.domain.backupBegin(xml, None, 0)
    directory = protect(guest, tmp_path)
    os.utime(directory / "alive", (0, 0))
    wait_for("its end", lambda: not directory.exists(), 60)
    assert guest.has_backup_job()
    guest.domain.abortJob()
