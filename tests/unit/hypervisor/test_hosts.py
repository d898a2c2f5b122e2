"""One suite for the machine here and one behind a real sshd: they do the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import wait_for
from sshd import Sshd

from oned_backup.errors import DriverFailed, Misconfigured, PermissionDenied, Unavailable
from oned_backup.hypervisor import offline, qemu_img
from oned_backup.hypervisor.host import Host, host_for

EVIL = "-$(id) `id` 'x' \"y\" ; & | > * ? ~ \\ ! # % é\n-n"


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("ssh") / "d") as server:
        yield server


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a path short enough for unix sockets."""
    with tempfile.TemporaryDirectory(prefix="odb-", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def over_ssh(sshd: Sshd, short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("ODB_SSH_CONFIG", str(sshd.config))
    return host_for(f"qemu+ssh://{sshd.target}/system", short_dir / "t")


@pytest.fixture(params=["here", "ssh"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    if request.param == "here":
        return host_for("qemu:///system", tmp_path)
    found: Host = request.getfixturevalue("over_ssh")
    return found


def test_programs(host: Host) -> None:
    assert host.run(["printf", "%s", EVIL]).stdout.decode() == EVIL
    data = os.urandom(300_000)
    assert host.run(["cat"], stdin=data).stdout == data
    assert host.run(["cat"]).stdout == b""
    assert host.run(["sh", "-c", "echo out; echo err >&2; exit 3"], check=False).returncode == 3
    with pytest.raises(DriverFailed, match=r"ls.*: .*cannot access.* \(exit code 2\)"):
        host.run(["ls", "/no/such/file"])
    with pytest.raises(Misconfigured, match="is not installed"):
        host.run(["no-such-program"])
    with pytest.raises(Unavailable, match=r"no end after 0\.5 s"):
        host.run(["sleep", "60"], timeout_s=0.5)


def test_files(host: Host, tmp_path: Path) -> None:
    path = tmp_path / EVIL
    assert host.read_file(str(path), max_bytes=9) is None
    host.write_file(path, b"one")
    host.write_file(path, b"two")
    assert (host.read_file(str(path), max_bytes=3), path.stat().st_mode & 0o777) == (b"two", 0o600)
    with pytest.raises(DriverFailed, match="more than 2 bytes"):
        host.read_file(str(path), max_bytes=2)
    identity, _, machine = host.file_id(str(path)).partition("@")
    assert (identity, machine) == (f"{path.stat().st_dev}:{path.stat().st_ino}", host.machine)
    assert host.names(tmp_path) == [EVIL]
    assert host.names(tmp_path / "absent") == []
    assert 0 < host.free_bytes(tmp_path) < 1 << 60
    host.remove(path)
    host.remove(path)
    assert host.names(tmp_path) == []


def test_directories(host: Host, tmp_path: Path) -> None:
    directory = tmp_path / "sockets" / "op-1"
    for _ in range(2):
        host.make_private_dir(directory)
        assert (directory.stat().st_mode & 0o777, list(directory.iterdir())) == (0o700, [])
        host.lend_dir(directory / "qemu", os.geteuid())
        assert directory.stat().st_mode & 0o777 == 0o711
        assert (directory / "qemu").stat().st_mode & 0o777 == 0o700
    before = os.umask(0o077)  # as the daemon has it
    try:
        host.make_dir(tmp_path / "scratch" / "deep")
    finally:
        os.umask(before)
    for made in (tmp_path / "scratch", tmp_path / "scratch" / "deep"):
        assert made.stat().st_mode & 0o777 == 0o711


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_image_for_another_user(host: Host, tmp_path: Path) -> None:
    path = tmp_path / EVIL
    qemu_img.create(host, str(path), 1 << 20)
    host.give(path, 12345)
    assert path.stat().st_uid == 12345
    (image,) = qemu_img.backing_chain(host, str(path), "qcow2")
    assert image.size_bytes == 1 << 20


def test_trees(host: Host, tmp_path: Path) -> None:
    tree = {"tpm2-00.permall": os.urandom(9000), "deep/a b": b""}
    directory = tmp_path / "swtpm" / "uuid"
    before = os.umask(0o077)
    try:
        host.write_tree(directory, tree)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (directory, directory.parent)} == {0o711}
    assert (directory / "deep/a b").stat().st_mode & 0o777 == 0o600
    (directory / ".lock").touch()
    (directory / "link").symlink_to("/etc/shadow")
    assert host.read_tree(directory, max_bytes=9000) == tree
    assert host.read_tree(tmp_path / "absent", max_bytes=1) is None
    with pytest.raises(DriverFailed, match="more than 8999 bytes"):
        host.read_tree(directory, max_bytes=8999)


def test_servers_are_found_by_their_locked_pid_file(host: Host, tmp_path: Path) -> None:
    image = tmp_path / "-a b.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "--", str(image), "1M"], check=True)
    server = offline.serve(host, str(image), "qcow2", directory=tmp_path, export="vda")
    pid = int(server.pid_file.read_text())
    socket_here = host.forward(server.socket)
    argv = ["nbdinfo", "--size", f"nbd+unix:///vda?socket={socket_here}"]
    assert subprocess.run(argv, check=True, capture_output=True, timeout=30).stdout == b"1048576\n"
    for _ in range(2):
        offline.stop_servers(host, tmp_path)
        assert not Path(f"/proc/{pid}").exists() or b"\nState:\tZ" in Path(f"/proc/{pid}/status").read_bytes()
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (tmp_path / "x.pid").write_text(f"{bystander.pid}\n")
        offline.stop_servers(host, tmp_path)
        assert bystander.poll() is None
        bystander.kill()


def test_tunnels_outlive_us_and_are_found_again(over_ssh: Host, sshd: Sshd, short_dir: Path) -> None:
    there = short_dir / "there.sock"
    code = (
        "import sys; from pathlib import Path; from oned_backup.hypervisor.host import host_for;"
        "host_for(sys.argv[1], Path(sys.argv[2])).forward(Path(sys.argv[3]))"
    )
    uri = f"qemu+ssh://{sshd.target}/system"
    argv = [sys.executable, "-c", code, uri, str(short_dir / "t"), str(there)]
    subprocess.run(argv, check=True, timeout=60)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(there))
        server.listen()
        threading.Thread(target=lambda: server.accept()[0].sendall(b"through"), daemon=True).start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(short_dir / "t" / "there.sock"))
            assert client.recv(7) == b"through"
    over_ssh.end_forwards()
    over_ssh.end_forwards()
    assert list((short_dir / "t").iterdir()) == []


def test_a_killed_driver_leaves_no_remote_command(over_ssh: Host, sshd: Sshd, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = (
        "import sys; from pathlib import Path; from oned_backup.hypervisor.host import host_for;"
        "host_for(sys.argv[1], Path('/t')).run(sys.argv[2:])"
    )
    command = ["sh", "-c", f"trap '' TERM; echo $$ >{pid}; while :; do sleep 1; done"]
    uri = f"qemu+ssh://{sshd.target}/system"
    driver = subprocess.Popen([sys.executable, "-c", code, uri, *command])
    wait_for("start of the command", lambda: pid.exists() and pid.read_text().strip(), 30)
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    wait_for("its end", lambda: not Path(f"/proc/{pid.read_text().strip()}").exists(), 30)


def test_what_is_wrong_with_the_connection(over_ssh: Host, sshd: Sshd) -> None:
    sshd.forget()
    with pytest.raises(Misconfigured, match="is not known") as caught:
        over_ssh.run(["true"])
    assert sshd.fingerprint in caught.value.message
    sshd.accept()
    known = sshd.known_hosts.read_text()
    other = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(sshd.directory / "id")], check=True, capture_output=True, text=True
    ).stdout.split()[:2]
    sshd.known_hosts.write_text(f"{known.split()[0]} {' '.join(other)}\n")
    with pytest.raises(Misconfigured, match="has changed") as caught:
        over_ssh.run(["true"])
    assert sshd.fingerprint in caught.value.message
    sshd.accept()
    authorized = sshd.directory / "id.pub"
    key = authorized.read_text()
    authorized.write_text("")
    with pytest.raises(PermissionDenied):
        over_ssh.run(["true"])
    authorized.write_text(key)
    assert over_ssh.run(["true"]).returncode == 0
    sshd.stop()
    try:
        with pytest.raises(Unavailable):
            over_ssh.run(["true"])
    finally:
        sshd.start()
    assert over_ssh.run(["true"]).returncode == 0


def test_a_host_here_loads_no_paramiko() -> None:
    code = (
        "import sys; from pathlib import Path; import oned_backup.transfer.driver;"
        "from oned_backup.hypervisor.host import host_for; host_for('qemu:///system', Path('/'));"
        "sys.exit('paramiko' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
