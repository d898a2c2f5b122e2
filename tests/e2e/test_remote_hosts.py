"""Two hypervisors and the daemon on three machines: namespaces with real sshd, libvirtd and cables."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backed_up_vm import new_file
from lab import Guest, LabError, data_disk, root_disk
from netlab import Machine, Netlab
from product import Product

pytestmark = pytest.mark.guest


def add_host(product: Product, machine: Machine, *, tm: str = "ssh") -> None:
    uri = f"qemu+ssh://root@{machine.name}/system"
    product.run(
        "host", "add", machine.name, "--uri", uri, "--tm", tm, "--accept-host-key", machine.fingerprint
    )


@pytest.fixture
def guest_on(netlab: Netlab) -> Iterator[Callable[..., Guest]]:
    """Boot a guest with a data disk on a machine; it is destroyed afterwards."""
    guests: list[Guest] = []

    def boot(machine: Machine, *, data_mib: int = 64) -> Guest:
        directory = Path(tempfile.mkdtemp(prefix="g", dir=machine.own))
        disks = [root_disk(directory), data_disk(directory, data_mib)]
        guest = Guest(machine.libvirtd, directory, f"web{len(guests)}", disks)
        guests.append(guest)
        guest.start()
        guest.wait_ready()
        return guest

    yield boot
    netlab.calm()
    for guest in guests:
        guest.destroy()


@pytest.fixture
def product(remote_product: Product, netlab: Netlab) -> Product:
    store = netlab["daemon"].own / "store"
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    remote_product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={store}")
    return remote_product


def backup(product: Product, *words: str) -> dict[str, Any]:
    product.run("vm", "backup", "0", *words, timeout_s=240)
    return newest(product)


def newest(product: Product) -> dict[str, Any]:
    shown: dict[str, Any] = product.ask("operation", "show", product.ask("operation", "list")[0]["id"])
    return shown


def reasons(operation: dict[str, Any]) -> dict[str, str]:
    return {disk["target"]: disk["reason"] for disk in operation["result"]["disks"]}


def remote_leftovers(machine: Machine) -> list[str]:
    """Processes, sockets and scratch files of ours on a hypervisor."""
    ours = [words for words in machine.processes().values() if "oned-backup" in " ".join(words)]
    files = [str(path) for path in (machine.root / "run/oned-backup").glob("*/*")]
    scratch = [str(path) for path in machine.own.rglob(".oned-backup-*")]
    return [" ".join(words) for words in ours] + files + scratch


def local_leftovers(machine: Machine) -> list[str]:
    """Tunnels and watchmen on the daemon's machine."""
    lines = [" ".join(words) for words in machine.processes().values()]
    return [line for line in lines if ".ctl" in line or "transfer.guard" in line or "virt-ssh-helper" in line]


def test_a_chain_over_ssh(netlab: Netlab, product: Product, guest_on: Callable[..., Guest]) -> None:
    hv1 = netlab["hv1"]
    guest = guest_on(hv1)
    with pytest.raises(LabError, match=re.escape(f"it shows {hv1.fingerprint}")):
        product.run("host", "add", "hv1", "--uri", "qemu+ssh://root@hv1/system", "--tm", "ssh")
    add_host(product, hv1)
    product.run("vm", "import", "hv1", guest.name)
    product.run("vm", "set", "0", "FS_FREEZE=AGENT", "MODE=INCREMENT")
    new_file(guest, "/data/vdb/one", 8)
    full = backup(product, "-d", "nightly")
    assert full["state"] == "DONE"
    assert full["result"]["freeze"]["method"] == "AGENT"
    new_file(guest, "/data/vdb/two", 4)
    assert reasons(backup(product)) == {"vda": "increment", "vdb": "increment"}
    guest.stop()
    assert reasons(backup(product)) == {"vda": "increment", "vdb": "increment"}
    assert remote_leftovers(hv1) == []
    assert local_leftovers(netlab["daemon"]) == []
    target = netlab["daemon"].own / "restored"
    product.run("image", "restore", "0", "--to", str(target), "--format", "raw")
    for number, disk in enumerate(guest.disks):
        (restored,) = target.glob(f"disk.{number}*.raw")
        argv = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(restored), str(disk.path)]
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
    shutil.rmtree(target)
