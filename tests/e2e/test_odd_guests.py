"""Guests that are unlike others: by their names, and by how many disks they have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt_qemu
import pytest
from backed_up_vm import BackedUpVm, command
from lab import Guest, LabDisk, Libvirtd
from product import Product

pytestmark = pytest.mark.guest

MIB = 1 << 20
#: as libvirt takes them
NAMES = ['it\'s "a b"', "grün ☃", "-rf", "--help", "$(touch x);a&b|c", "%s{0}", "x" * 120]


def small_disk(path: Path, byte: int) -> LabDisk:
    """A disk of 1 MiB full of that byte."""
    command("qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M")
    command("qemu-io", "-f", "qcow2", "-c", f"write -P {byte} 0 1M", str(path))
    return LabDisk(path)


@pytest.fixture
def odd_guests(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[list[Guest]]:
    """A guest of each name, with one small disk; all are off."""
    guests = []
    for number, name in enumerate(NAMES):
        disk = small_disk(tmp_path / f"{number}.qcow2", number + 1)
        guest = Guest(libvirtd, tmp_path, "plain", [disk], boot="disk", agent=False)
        guest.domain.undefine()
        guest.name, guest.serial = name, tmp_path / f"{number}.serial"
        guest.domain = libvirtd.connection.defineXML(guest.xml())
        guests.append(guest)
    yield guests
    for guest in guests:
        guest.destroy()


@pytest.mark.fault("odd inputs", "VM names with spaces, quotes, unicode, a leading dash")
def test_names(odd_guests: list[Guest], product: Product, tmp_path: Path) -> None:
    product.run("host", "add", "local", "--uri", odd_guests[0].uri)
    (tmp_path / "store").mkdir()
    product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={tmp_path}/store")
    product.run("vm", "import", "local", "--", *NAMES)
    assert {vm["name"] for vm in product.ask("vm", "list")} == set(NAMES)
    for number, name in enumerate(NAMES):
        done = json.loads(product.run("vm", "backup", "-d", "nightly", "--json", "--", name))
        image, target = str(done["result"]["image_id"]), tmp_path / f"restored-{number}"
        product.run("image", "restore", image, "--to", str(target), "--format", "raw")
        assert (target / "disk.0.raw").read_bytes() == bytes([number + 1]) * MIB


class ManyDisks(Guest):
    """A guest with more disks than PCI slots: they are behind one SCSI controller."""

    def __init__(self, libvirtd: Libvirtd, directory: Path, disks: dict[str, LabDisk]) -> None:
        self.many = disks
        super().__init__(libvirtd, directory, "many", [], boot="disk", agent=False)

    def writable_disks(self) -> dict[str, LabDisk]:
        return self.many

    def xml(self) -> str:
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk.path}'/>"
            f"<target dev='{target}' bus='scsi'/>"
            f"<address type='drive' controller='0' bus='0' target='0' unit='{unit}'/></disk>"
            for unit, (target, disk) in enumerate(self.many.items())
        )
        controller = "<controller type='scsi' index='0' model='virtio-scsi'/>"
        return super().xml().replace("<devices>", f"<devices>{controller}{disks}")


@pytest.mark.whole_matrix
@pytest.mark.fault("odd inputs", "64 disks")
def test_64_disks(
    libvirtd: Libvirtd,
    back_up: Callable[[Guest], BackedUpVm],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    first = small_disk(tmp_path / "first.qcow2", 7).path
    letters = [chr(ord("a") + number) for number in range(26)]
    targets = [f"sd{one}{two}" for one in ["", "a", "b"] for two in letters][:64]
    disks = {
        target: LabDisk(shutil.copy(first, tmp_path / f"{number}.qcow2"))
        for number, target in enumerate(targets)
    }
    guest = ManyDisks(libvirtd, tmp_path, disks)
    guest.start()
    try:
        vm = back_up(guest)
        assert len(vm.backup().exports.disks) == 64
        for byte, unit in enumerate((0, 63)):
            write = f'qemu-io -d scsi0-0-0-{unit} "write -P {byte} 0 64k"'
            assert libvirt_qemu.qemuMonitorCommand(guest.domain, write, 1) == ""
        point = vm.backup()
        assert {disk.reason.value for disk in point.exports.disks} == {"increment"}
        for target in ("sda", "sdb", "sdbl"):
            vm.assert_restores(target)
        guest.end()
        vm.assert_survived()
        record_property("observed", "full, increment while it runs, increment while off")
    finally:
        guest.destroy()
