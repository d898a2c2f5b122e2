"""A transfer that is cut off goes on where it was, and what it finds there is proved first."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lab import wait_for
from sshd import Sshd
from stores import Disk, Store, export, exports_of, meanwhile

from oned_backup.errors import NoSpace, OnedBackupError
from oned_backup.runner.run import Cancellation, Limits

ID = "20260101-000000-aaaaaa"
#: slow enough to be caught in the middle: the disk has 3 MB
SLOW = "3000"
BOTH = pytest.mark.parametrize("compression", ["none", "zstd:1"])
KILL = Limits(deadline_s=60, inactivity_s=60, grace_s=0, stop_signal=signal.SIGKILL)


def backed_up(store: Store, disk: Disk, cancellation: Cancellation | None = None) -> None:
    with disk.served() as socket:
        store.backup(ID, exports_of(export(disk, socket)), cancellation=cancellation)


def restored(store: Store) -> bytes:
    return store.download(store.url())


def arrived(store: Store, size: int = 1 << 20) -> os.stat_result:
    """The file of the disk on the server, when more than so much of it is there."""
    file = store.base / str(store.vm_id) / f".partial-{ID}" / "disk.0.0"
    wait_for(f"{size} bytes", lambda: file.exists() and file.stat().st_size > size, 60)
    return file.stat()


def cut(sshd: Sshd) -> None:
    """End the sshd sessions, as a server does that goes down."""
    pid = (sshd.directory / "sshd.pid").read_text().strip()

    def sessions() -> list[str]:
        return subprocess.run(
            ["pgrep", "-P", pid], capture_output=True, text=True, check=False
        ).stdout.split()

    for session in wait_for("a session", sessions):
        os.kill(int(session), signal.SIGKILL)


@BOTH
@pytest.mark.fault("store", "unreachable in mid-transfer")
def test_a_connection_that_is_cut_is_continued(
    compression: str, make: Callable[..., Store], disk: Disk, sshd: Sshd, tmp_path: Path
) -> None:
    store = make(RSYNC_BWLIMIT=SLOW, COMPRESSION=compression)
    seen: list[os.stat_result] = []

    def cut_twice() -> None:
        seen.append(arrived(store, 1 << 20))
        cut(sshd)
        seen.append(arrived(store, seen[0].st_size + (1 << 19)))
        cut(sshd)

    with meanwhile(cut_twice):
        backed_up(store, disk)
    assert (store.path(ID) / "disk.0.0").stat().st_ino == seen[0].st_ino
    assert any("the next attempt is in 1 s" in line for line in store.logged)
    assert any("answers again" in line and line.endswith("going on") for line in store.logged)
    assert restored(store) == disk.copy_raw(tmp_path / "raw").read_bytes()
    assert store.failures() == {ID: {}}


@BOTH
@pytest.mark.fault("store", "program (rsync, restic) killed here or there")
def test_the_same_id_again_continues_what_a_killed_driver_left(
    compression: str, make: Callable[..., Store], disk: Disk, tmp_path: Path
) -> None:
    store = make(RSYNC_BWLIMIT=SLOW, COMPRESSION=compression)
    cancellation = Cancellation()
    seen: list[os.stat_result] = []

    def kill() -> None:
        seen.append(arrived(store))
        cancellation.cancel()

    with meanwhile(kill), pytest.raises(OnedBackupError):
        backed_up(replace(store, limits=KILL), disk, cancellation)
    assert store.names() == {f".partial-{ID}"}
    backed_up(store, disk)
    assert (store.path(ID) / "disk.0.0").stat().st_ino == seen[0].st_ino
    assert restored(store) == disk.copy_raw(tmp_path / "raw").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "compression"),
    [
        ("disk.0.0", b"\xaa" * (1 << 20), "none"),
        ("disk.0.0", b"\xaa" * (1 << 20), "zstd"),
        ("disk.0.0", b"\xaa" * (64 << 20), "none"),
        ("disk.0.0.blocks", b"\0", "none"),
        ("disk.3.0", b"of another disk", "none"),
        ("manifest.json", b"{}", "none"),
        ("vm.xml", b"", "none"),
    ],
)
def test_what_is_there_of_something_else_is_never_kept(
    name: str, content: bytes, compression: str, make: Callable[..., Store], disk: Disk, tmp_path: Path
) -> None:
    store = make(COMPRESSION=compression)
    partial = store.base / "7" / f".partial-{ID}"
    partial.mkdir(parents=True)
    (partial / name).write_bytes(content)
    backed_up(store, disk)
    assert restored(store) == disk.copy_raw(tmp_path / "raw").read_bytes()
    assert store.failures() == {ID: {}}


def test_links_that_somebody_left_are_not_written_through(
    make: Callable[..., Store], disk: Disk, tmp_path: Path
) -> None:
    store = make()
    (tmp_path / "victim").write_bytes(b"must stay")
    partial = store.base / "7" / f".partial-{ID}"
    partial.mkdir(parents=True)
    (partial / "vm.xml").symlink_to(tmp_path / "victim")
    backed_up(store, disk)
    assert (tmp_path / "victim").read_bytes() == b"must stay"
    assert (store.path(ID) / "vm.xml").read_bytes() == (store.source / "vm.xml").read_bytes()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
@pytest.mark.fault("store", "full in mid-transfer")
def test_a_disk_that_fills_up_meanwhile_is_no_space_and_keeps_nothing(
    make: Callable[..., Store], disk: Disk
) -> None:
    store = make(RSYNC_BWLIMIT=SLOW)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", store.base], check=True)
    try:

        def fill() -> None:
            arrived(store)
            subprocess.run(
                ["dd", "if=/dev/zero", f"of={store.base}/filler", "bs=64k"], capture_output=True, check=False
            )

        with meanwhile(fill), pytest.raises(NoSpace, match=r"MB needed, 0 MB free"):
            backed_up(store, disk)
        assert store.names() == set()
        (store.base / "filler").unlink()
        backed_up(store, disk)
        assert store.names() == {ID}
    finally:
        subprocess.run(["umount", store.base], check=True)
