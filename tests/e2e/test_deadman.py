"""The shell that protects a guest on a host whose link is dead; here it runs beside its libvirtd."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import Guest, wait_for

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


def test_a_guest_that_stays_frozen_or_suspended_goes_on(guest: Guest, protect: Callable[..., Path]) -> None:
    directory = protect(guest, freeze_s=0)
    guest.agent("guest-fsfreeze-freeze")
    assert is_frozen(guest)
    (directory / "frozen").touch()
    wait_for("thaw", lambda: not is_frozen(guest), 60)
    assert not (directory / "frozen").exists()
    guest.suspend()
    (directory / "suspended").touch()
    wait_for("the guest to go on", lambda: not guest.is_paused(), 60)
    wait_for("the end of the note", lambda: not (directory / "suspended").exists(), 60)


def test_when_nobody_is_left_our_job_ends_and_all_goes(
    guest: Guest, protect: Callable[..., Path], short_dir: Path, tmp_path: Path
) -> None:
    begin_job(guest, short_dir / "other.sock", tmp_path / "other.scratch")
    guest.agent("guest-fsfreeze-freeze")
    directory = protect(guest, tmp_path)
    os.utime(directory / "alive", (0, 0))
    wait_for("its end", lambda: not directory.exists(), 60)
    assert guest.has_backup_job()  # somebody else's
    assert is_frozen(guest)
    guest.agent("guest-fsfreeze-thaw")
    guest.domain.abortJob()
    wait_for("end of the other job", lambda: not guest.has_backup_job(), 30)

    directory = protect(guest, tmp_path)
    begin_job(guest, directory / "nbd.sock", tmp_path / f"{PREFIX}vda.scratch")
    os.utime(directory / "alive", (0, 0))
    wait_for("end of the job", lambda: not guest.has_backup_job(), 60)
    wait_for("removal", lambda: not directory.exists(), 60)
    assert list(tmp_path.glob(f"{PREFIX}*")) == []


def begin_job(guest: Guest, socket: Path, scratch: Path) -> None:
    guest.domain.backupBegin(
        f"""<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>
        <disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>
        </disks></domainbackup>""",
        None,
        0,
    )
