"""VMs on a libvirt that is reached by SSH: a private sshd leads back to this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backed_up_vm import INSTALLATION, BackedUpVm, new_file
from lab import Guest, data_disk, root_disk
from sshd import Sshd

pytestmark = pytest.mark.guest

#: where our things lie on a remote host
REMOTE = Path("/run/oned-backup") / INSTALLATION


#: libvirt wants `nc -U` on a host whose libvirtd has its socket elsewhere
NETCAT = """\
#!/usr/bin/python3
import os, socket, sys, threading
if "-U" not in sys.argv:
    sys.exit(1)
there = socket.socket(socket.AF_UNIX)
there.connect(sys.argv[-1])
def copy(read, write):
    while data := read(65536):
        write(data)
    os._exit(0)
threading.Thread(target=copy, args=(there.recv, lambda data: os.write(1, data))).start()
copy(lambda size: os.read(0, size), there.sendall)
"""


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("ssh") / "d") as server:
        yield server


@pytest.fixture
def remote_vm(sshd: Sshd, tmp_path: Path, short_dir: Path) -> Callable[..., BackedUpVm]:
    def know(guest: Guest, tm: str = "ssh") -> BackedUpVm:
        netcat = sshd.directory / "nc"
        netcat.write_text(NETCAT)
        netcat.chmod(0o755)
        uri = f"{guest.uri.replace('qemu:///', f'qemu+ssh://{sshd.target}/')}&netcat={netcat}"
        vm = BackedUpVm(guest, tmp_path, short_dir / "s", uri=uri, tm=tm)
        vm.environment["ODB_SSH_CONFIG"] = str(sshd.config)
        return vm

    return know


def nothing_left(vm: BackedUpVm) -> None:
    assert not REMOTE.exists() or list(REMOTE.iterdir()) == []
    assert not list(vm.socket_dir.glob("*"))


def test_chain_of_running_and_off(
    make_guest: Callable[..., Guest], remote_vm: Callable[..., BackedUpVm], tmp_path: Path
) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64)])
    vm = remote_vm(guest)
    new_file(guest, "/data/vdb/one", 8)
    full = vm.backup(fs_freeze="NONE")
    assert {disk.type.value for disk in full.exports.disks} == {"FULL"}
    assert all(disk.nbd_socket.startswith(str(vm.socket_dir)) for disk in full.exports.disks)
    new_file(guest, "/data/vdb/two", 4)
    assert vm.backup().reason("vdb") == "increment"
    vm.assert_restores("vdb")
    frozen = vm.backup(fs_freeze="AGENT")
    assert frozen.exports.freeze.method == "AGENT"
    new_file(guest, "/data/vdb/three", 4)
    guest.stop()
    off = vm.backup()
    assert off.reason("vda") == off.reason("vdb") == "increment"
    vm.assert_restores("vda")
    vm.assert_restores("vdb")
    nothing_left(vm)
