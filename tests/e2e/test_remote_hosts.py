"""Two hypervisors and the daemon on three machines: namespaces with real sshd, libvirtd and cables."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import libvirt
import pytest
from backed_up_vm import new_file
from lab import HERE, Guest, LabDisk, LabError, data_disk, root_disk, wait_for
from netlab import Machine, Netlab
from product import Product

pytestmark = pytest.mark.guest


def add_host(product: Product, machine: Machine, *, tm: str = "ssh") -> None:
    assert machine.libvirtd.connection.isAlive()
    uri = f"qemu+ssh://root@{machine.name}/system"
    product.run(
        "host", "add", machine.name, "--uri", uri, "--tm", tm, "--accept-host-key", machine.fingerprint
    )


@pytest.fixture
def guest_on(netlab: Netlab) -> Iterator[Callable[..., Guest]]:
    """Boot a guest with a data disk on a machine; it is destroyed afterwards."""
    guests: list[Guest] = []

    def boot(machine: Machine, *, shared: Path | None = None) -> Guest:
        directory = Path(tempfile.mkdtemp(prefix="g", dir=shared or machine.own))
        disks = [root_disk(directory), data_disk(directory, 64)]
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
    lines = [" ".join(words).replace(str(HERE.parents[1]), "") for words in machine.processes().values()]
    ours = [line for line in lines if "oned-backup" in line]
    files = [str(path) for path in (machine.root / "run/oned-backup").glob("*/*")]
    scratch = [str(path) for path in machine.own.rglob(".oned-backup-*")]
    return ours + files + scratch


def local_leftovers(machine: Machine) -> list[str]:
    """Tunnels and watchmen on the daemon's machine."""
    lines = [" ".join(words) for words in machine.processes().values()]
    return [line for line in lines if ".ctl" in line or "transfer.guard" in line or "virt-ssh-helper" in line]


def nothing_left(netlab: Netlab) -> None:
    wait_for("end of everything there", lambda: not remote_leftovers(netlab["hv1"]), 30)
    wait_for("end of everything here", lambda: not local_leftovers(netlab["daemon"]), 30)


def tunnels(machine: Machine) -> list[str]:
    return [line for line in local_leftovers(machine) if ".ctl" in line]


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
    nothing_left(netlab)
    same_as_restored(netlab, product, guest.disks)


def same_as_restored(netlab: Netlab, product: Product, disks: Sequence[LabDisk]) -> None:
    """The newest restore point has what is in the disks of a guest that is off."""
    target = netlab["daemon"].own / "restored"
    product.run("image", "restore", "0", "--to", str(target), "--format", "raw")
    for number, disk in enumerate(disks):
        (restored,) = target.glob(f"disk.{number}*.raw")
        argv = ["qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(restored), str(disk.path)]
        subprocess.run(argv, check=True, capture_output=True, timeout=60)
    shutil.rmtree(target)


def test_a_port_and_a_socket_in_the_uri(netlab: Netlab, product: Product) -> None:
    """All that goes to the host goes there: libvirt, commands, the disk, and what is restored."""
    hv1 = netlab["hv1"]
    directory = Path(tempfile.mkdtemp(prefix="g", dir=hv1.own))
    guest = Guest(hv1.libvirtd, directory, "off", [data_disk(directory, 16)], agent=False)
    pid_file = hv1.own / "sshd-2222.pid"
    options = ["-o", "Port=2222", "-o", f"PidFile={pid_file}"]
    hv1.run(["/usr/sbin/sshd", "-f", hv1.directory / "ssh/sshd_config", *options])
    os.kill(hv1.outer_pid(int((hv1.directory / "sshd.pid").read_text())), signal.SIGTERM)
    try:
        uri = f"qemu+ssh://root@hv1:2222/system?socket={hv1.libvirtd.directory}/run/libvirt-sock"
        product.run("host", "add", "hv1", "--uri", uri, "--tm", "ssh", "--accept-host-key", hv1.fingerprint)
        product.run("vm", "import", "hv1", guest.name)
        assert backup(product, "-d", "nightly")["state"] == "DONE"
        product.run("image", "restore", "0", "--define", "hv1", "--to", "/srv/again", "--name", "again")
        assert "/srv/again/disk.0.qcow2" in hv1.libvirtd.connection.lookupByName("again").XMLDesc()
        nothing_left(netlab)
    finally:
        guest.destroy()
        Guest.adopt(hv1.libvirtd, "again").destroy()
        hv1.run(["rm", "-rf", "/srv/again"])
        os.kill(hv1.outer_pid(int(pid_file.read_text())), signal.SIGTERM)
        shutil.rmtree(directory)


def known(product: Product, guest: Guest, machine: Machine, *, freeze: str = "AGENT") -> None:
    """Have the daemon know the machine and its guest."""
    add_host(product, machine)
    product.run("vm", "import", machine.name, guest.name)
    product.run("vm", "set", "0", f"FS_FREEZE={freeze}", "MODE=INCREMENT")


def start_backup(product: Product, *words: str) -> str:
    """The id of a backup that has begun to store."""
    operation = product.ask("vm", "backup", "0", "--no-wait", *words)["id"]
    wait_for("the step STORE", lambda: step(product, operation) == "STORE", 90)
    return str(operation)


def step(product: Product, operation: str) -> str:
    shown = product.ask("operation", "show", operation)
    return str(shown["steps"][-1]["name"]) if shown["steps"] else ""


def ended(product: Product, operation: str, timeout_s: float = 120) -> dict[str, Any]:
    def final() -> dict[str, Any] | None:
        shown: dict[str, Any] = product.ask("operation", "show", operation)
        return shown if shown["state"] in {"DONE", "FAILED", "CANCELLED"} else None

    found: dict[str, Any] = wait_for("end of the operation", final, timeout_s)
    return found


@pytest.mark.fault("host", "hypervisor unreachable in mid-transfer")
def test_a_cable_that_is_pulled_in_mid_transfer(
    netlab: Netlab, product: Product, guest_on: Callable[..., Guest]
) -> None:
    hv1 = netlab["hv1"]
    guest = guest_on(hv1)
    known(product, guest, hv1)
    new_file(guest, "/data/vdb/one", 40)
    hv1.rate("20mbit")
    operation = start_backup(product, "-d", "nightly")
    assert guest.has_backup_job()
    hv1.link(up=False)
    wait_for("end of the step", lambda: step(product, operation) != "STORE", 90)
    assert guest.shell("echo runs >/data/vdb/runs; cat /data/vdb/runs") == "runs"
    wait_for("end of the tunnel", lambda: not tunnels(netlab["daemon"]), 60)
    netlab.calm()
    done = ended(product, operation)  # it is tried again until the host is back
    assert done["state"] == "DONE", done["error"]
    assert {entry["attempt"] for entry in done["steps"]} > {1}
    assert not guest.has_backup_job()
    nothing_left(netlab)


@pytest.mark.fault("daemon", "daemon killed while a real guest is in mid-transfer")
def test_a_killed_daemon_leaves_nothing_on_the_hypervisor(
    netlab: Netlab, product: Product, guest_on: Callable[..., Guest]
) -> None:
    hv1 = netlab["hv1"]
    guest = guest_on(hv1)
    known(product, guest, hv1)
    new_file(guest, "/data/vdb/one", 40)
    hv1.rate("20mbit")
    operation = start_backup(product, "-d", "nightly")
    product.kill()
    product.start()
    netlab.calm()
    failed = ended(product, operation)
    assert failed["state"] == "FAILED"
    assert not guest.has_backup_job()
    nothing_left(netlab)
    assert guest.shell("echo runs >/data/vdb/runs; cat /data/vdb/runs") == "runs"


@pytest.mark.parametrize(
    "moves",
    [
        pytest.param(
            "copied, off",
            marks=[
                pytest.mark.whole_matrix,
                pytest.mark.fault("change tracking", "VM moved to another host, off"),
            ],
        ),
        pytest.param("copied, live", marks=pytest.mark.whole_matrix),
        pytest.param(
            "shared, live",
            marks=[
                pytest.mark.whole_matrix,  # as test_a_backup_waits_for_a_migration does
                pytest.mark.fault("change tracking", "VM moved to another host, running"),
            ],
        ),
    ],
)
def test_a_vm_that_moves_keeps_its_chain(
    netlab: Netlab, product: Product, guest_on: Callable[..., Guest], moves: str
) -> None:
    hv1, hv2 = netlab["hv1"], netlab["hv2"]
    is_shared = moves.startswith("shared")
    guest = guest_on(hv1, shared=netlab.directory if is_shared else None)
    known(product, guest, hv1, freeze="NONE")
    add_host(product, hv2, tm="shared" if is_shared else "ssh")
    new_file(guest, "/data/vdb/one", 8)
    backup(product, "-d", "nightly")
    new_file(guest, "/data/vdb/two", 4)
    if moves.endswith("live"):
        moved = migrate(guest, hv2)
        new_file(moved, "/data/vdb/three", 4)
    else:
        guest.stop()
        moved = move(guest, hv2)
    try:
        done = backup(product)
        assert reasons(done) == {"vda": "increment", "vdb": "increment"}
        assert "the VM has moved from host hv1 to hv2" in done["result"]["notes"]
        assert product.ask("vm", "show", "0")["host"] == "hv2"
        if moves.endswith("live"):
            moved.stop()  # QEMU writes the bitmaps into the images
        assert reasons(backup(product)) == {"vda": "increment", "vdb": "increment"}
        same_as_restored(netlab, product, moved.disks)
    finally:
        moved.destroy()


def move(guest: Guest, machine: Machine) -> Guest:
    """The guest, which is off, on another machine; images that it cannot see are copied there."""
    old, new = _places(guest, machine)
    if new != old:
        for disk in guest.disks:
            shutil.copy(disk.path, new)
    xml = guest.domain.XMLDesc(0).replace(old, new)
    guest.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
    machine.libvirtd.connection.defineXML(xml)
    return _adopted(guest, machine, new)


def migrate(guest: Guest, machine: Machine, *, mib_per_s: int = 0) -> Guest:
    """The running guest on another machine; libvirt copies images that it cannot see, too."""
    old, new = _places(guest, machine)
    flags = libvirt.VIR_MIGRATE_LIVE | libvirt.VIR_MIGRATE_PEER2PEER | libvirt.VIR_MIGRATE_PERSIST_DEST
    flags |= libvirt.VIR_MIGRATE_UNDEFINE_SOURCE | libvirt.VIR_MIGRATE_UNSAFE
    xml = guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE).replace(old, new)
    parameters: dict[str, object] = {"destination_xml": xml, "persistent_xml": xml}
    if mib_per_s:
        parameters["bandwidth"] = mib_per_s
    if new != old:
        flags |= libvirt.VIR_MIGRATE_NON_SHARED_DISK
        for target, disk in guest.writable_disks().items():
            size = guest.domain.blockInfo(target)[0]
            argv = ["qemu-img", "create", "-q", "-f", "qcow2", Path(new) / disk.path.name, str(size)]
            subprocess.run(argv, check=True, timeout=60)
    assert machine.libvirtd.connection.isAlive()
    guest.domain.migrateToURI3(f"qemu+ssh://root@{machine.name}/system", parameters, flags)
    return _adopted(guest, machine, new)


def _places(guest: Guest, machine: Machine) -> tuple[str, str]:
    """The guest's directory, and the one that it is to have on the machine: the same if it is seen there."""
    old = str(guest.directory)
    if (machine.root / old.lstrip("/")).exists():
        return old, old
    return old, tempfile.mkdtemp(prefix="g", dir=machine.own)


def _adopted(guest: Guest, machine: Machine, directory: str) -> Guest:
    moved = Guest.adopt(machine.libvirtd, guest.name)
    moved.serial = Path(directory) / guest.serial.name if guest.serial else None
    moved.disks = [replace(disk, path=Path(directory) / disk.path.name) for disk in guest.disks]
    return moved


@pytest.mark.fault("change tracking", "backup asked for while the VM is being migrated")
def test_a_backup_waits_for_a_migration(
    netlab: Netlab, product: Product, guest_on: Callable[..., Guest]
) -> None:
    """Neither is the guest frozen while libvirt is busy with it, nor the chain given up."""
    hv1, hv2 = netlab["hv1"], netlab["hv2"]
    guest = guest_on(hv1, shared=netlab.directory)
    known(product, guest, hv1)
    add_host(product, hv2, tm="shared")
    backup(product, "-d", "nightly")
    with ThreadPoolExecutor(1) as pool:
        guest.shell("dd if=/dev/urandom of=/ballast bs=1M count=40")  # in memory: it takes its time
        migration = pool.submit(migrate, guest, hv2, mib_per_s=1)
        wait_for("the migration", lambda: guest.domain.jobStats().get("type"), 60)
        operation = product.ask("vm", "backup", "0", "--no-wait")["id"]
        wait_for("the backup to wait", lambda: "is being migrated" in notes(product, operation), 60)
        assert guest.agent("guest-fsfreeze-status") == "thawed"
        guest.domain.migrateSetMaxSpeed(1000)
        moved = migration.result(120)
    try:
        done = ended(product, operation)
        assert done["state"] == "DONE", done["error"]
        assert reasons(done) == {"vda": "increment", "vdb": "increment"}
        assert "the VM has moved from host hv1 to hv2" in done["result"]["notes"]
    finally:
        moved.destroy()


@pytest.mark.whole_matrix  # libvirt takes half a minute to say no
@pytest.mark.fault("change tracking", "VM to be migrated while its backup runs")
def test_a_migration_is_refused_while_a_backup_runs(
    netlab: Netlab, product: Product, guest_on: Callable[..., Guest]
) -> None:
    hv1, hv2 = netlab["hv1"], netlab["hv2"]
    guest = guest_on(hv1, shared=netlab.directory)
    known(product, guest, hv1)
    add_host(product, hv2, tm="shared")
    new_file(guest, "/data/vdb/one", 40)
    hv1.rate("4mbit")
    operation = start_backup(product, "-d", "nightly")
    with pytest.raises(libvirt.libvirtError, match="cannot acquire state change lock"):
        migrate(guest, hv2)
    netlab.calm()
    done = ended(product, operation)
    assert done["state"] == "DONE", done["error"]
    moved = migrate(guest, hv2)
    try:
        assert reasons(backup(product)) == {"vda": "increment", "vdb": "increment"}
    finally:
        moved.destroy()


def notes(product: Product, operation: str) -> str:
    return str(product.ask("operation", "show", operation))
