"""What a restore makes on a host that is reached by SSH: a private sshd leads back to this machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lab import wait_for
from sshd import Sshd

from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Outcome, Request
from oned_backup.contract.targets import NewDisk
from oned_backup.disk.chain import Layer
from oned_backup.disk.restore import restore_chain
from oned_backup.disk.target import NbdExport, parse_target
from oned_backup.errors import Conflict, NoSpace, NotFound, PermissionDenied
from oned_backup.hypervisor.host import LocalHost
from oned_backup.hypervisor.ssh_host import SshHost
from oned_backup.model.host import new_host, with_paths
from oned_backup.transfer import guard, restoring
from oned_backup.transfer.restoring import Restoring, clean, place, prepare

MIB = 1 << 20


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("ssh") / "d") as server:
        yield server


@pytest.fixture
def task(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restoring]:
    """A restore to a directory whose parent does not exist, on a machine of another name."""
    monkeypatch.setenv("ODB_SSH_CONFIG", str(sshd.config))
    tunnels = sshd.directory / "t"
    host = SshHost(sshd.target, "other", tunnels)
    uri = f"qemu+ssh://{sshd.target}/system"
    task = Restoring(host, uri, "op-0123456789ab", tmp_path / "a" / "b", tmp_path / "servers", tunnels)
    yield task
    clean(task, made=True)
    assert not tunnels.exists()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 3M", path], check=True, capture_output=True)
    return path


def same(path: Path, image: Path) -> None:
    argv = ["qemu-img", "compare", "-q", "-f", "qcow2", "-F", "qcow2", path, image]
    subprocess.run(argv, check=True, timeout=60)


def test_a_directory_of_another_machine(
    task: Restoring, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "_is_here", lambda *_: False)
    disks = [NewDisk(number, f"disk.{number}.qcow2", 8 * MIB) for number in (0, 1)]
    prepare(task, disks, {}, "qcow2")
    targets = prepare(task, disks, {"nvram.fd": b"secret"}, "qcow2")  # again: another attempt
    for target in targets:
        export = parse_target(target.target)
        assert isinstance(export, NbdExport)
        assert target.format == "raw"
        restore_chain([Layer(image, None, "image")], export, format="raw")
    assert not task.directory.parent.exists()
    for _ in range(2):
        place(task, ["disk.0.qcow2", "disk.1.qcow2", "nvram.fd"])
    clean(task, made=False)
    for number in (0, 1):
        same(task.directory / f"disk.{number}.qcow2", image)
    assert (task.directory / "nvram.fd").read_bytes() == b"secret"
    assert sorted(path.name for path in task.directory.iterdir()) == [
        "disk.0.qcow2",
        "disk.1.qcow2",
        "nvram.fd",
    ]
    assert not task.servers.exists()


def test_servers_end_when_nobody_is_left(task: Restoring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restoring, "_is_here", lambda *_: False)
    prepare(task, [NewDisk(0, "d.qcow2", 8 * MIB)], {"vm.xml": b"one"}, "qcow2")
    guard.stop(task.tunnels)
    assert processes("qemu-nbd", str(task.servers))
    os.utime(task.servers / "alive", (0, 0))
    wait_for("end of the server", lambda: not processes("qemu-nbd", str(task.servers)), 30)
    wait_for("removal", lambda: not task.servers.exists(), 30)
    assert list(task.directory.parents[1].glob(".oned-backup-*")) == []
    clean(task, made=True)  # nothing there is no error


def processes(*words: str) -> list[str]:
    listed = subprocess.run(["ps", "-ewwo", "args"], check=True, capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if all(word in line for word in words)]


def test_too_little_room_is_told_before_anything_is_made(task: Restoring, tmp_path: Path) -> None:
    for host, name in ((task.host, "other:/"), (LocalHost(), "^/")):
        with pytest.raises(NoSpace, match=rf"{name}.*/a/b: at least 1099511627776 MB needed, \d+ MB free"):
            prepare(replace(task, host=host), [], {"vm.xml": b"one"}, "raw", room_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_also_ours(task: Restoring, image: Path) -> None:
    """Disks need not go through a tunnel."""
    (target,) = prepare(task, [NewDisk(0, "d.qcow2", 8 * MIB)], {}, "qcow2")
    assert target.format == "qcow2"
    restore_chain([Layer(image, None, "image")], Path(target.target), format="qcow2")
    place(task, ["d.qcow2"])
    clean(task, made=False)
    same(task.directory / "d.qcow2", image)


def test_what_was_placed_is_taken_back(task: Restoring) -> None:
    prepare(task, [], {"vm.xml": b"one", "domain.xml": b"two"}, "qcow2")
    place(task, ["vm.xml", "domain.xml"])
    clean(task, made=True)
    assert not task.directory.parent.exists()
    task.directory.mkdir(parents=True)
    (task.directory / "theirs").touch()
    prepare(task, [], {"vm.xml": b"one"}, "qcow2")
    (task.directory / "vm.xml").touch()  # somebody was quicker
    with pytest.raises(Conflict, match=r"vm\.xml exists already"):
        place(task, ["vm.xml"])
    clean(task, made=True)
    assert sorted(path.name for path in task.directory.iterdir()) == ["theirs", "vm.xml"]


def test_places_that_cannot_be(task: Restoring, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for host in (task.host, LocalHost()):
        with pytest.raises(Conflict, match="is not a directory"):
            prepare(replace(task, host=host, directory=tmp_path / "file" / "x"), [], {"a": b""}, "raw")
        with pytest.raises((NotFound, PermissionDenied)):
            prepare(replace(task, host=host, directory=Path("/proc/x")), [], {"a": b""}, "raw")
        with pytest.raises(NotFound, match="nothing of operation"):
            place(replace(task, host=host), ["a"])


@pytest.mark.parametrize(("outcome", "stays"), [(Outcome.FAILURE, False), (Outcome.SUCCESS, True)])
def test_the_state_of_a_tpm_whose_domain_was_not_defined_goes(
    tmp_path: Path, outcome: Outcome, *, stays: bool
) -> None:
    host = with_paths(new_host(0, name="here"), {"SWTPM_DIR": str(tmp_path / "swtpm")}).element
    (tmp_path / "swtpm" / "uuid-1" / "tpm2").mkdir(parents=True)
    (tmp_path / "swtpm" / "uuid-2").mkdir()
    options = {
        "DIRECTORY": str(tmp_path / "restored"),
        "SOCKET_DIR": str(tmp_path / "nbd"),
        "INSTALLATION": "0badcafe",
        "DOMAIN_UUID": "uuid-1",
    }
    request = Request(Kind.TM, "op-0123456789ab", "restore", outcome=outcome, host=host, options=options)
    for _ in range(2):
        restoring.post_restore(request)
    assert (tmp_path / "swtpm" / "uuid-1").exists() == stays
    assert (tmp_path / "swtpm" / "uuid-2").exists()
