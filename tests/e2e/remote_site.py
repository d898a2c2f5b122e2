"""A site for tests: hypervisors, a backup server with two stores, VMs, and what they should restore to.

The daemon's machine is a hypervisor itself; the others are reached by SSH. Of each backup the site
keeps copies of the disks made by QEMU alone while the guest stood still, so that every restore
can be compared with what was really there.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backed_up_vm import command
from lab import Guest, LabDisk, data_disk, root_disk, wait_for
from netlab import Machine, Netlab
from product import Product

from oned_backup.client import Client

PASSWORD = "a password that nothing may print"  # noqa: S105
STORES = ("rsync", "restic")


@dataclass
class SiteVm:
    """A guest, its number in the catalogue, where it is backed up to, and its disks at each backup."""

    guest: Guest
    number: int
    store: str
    #: by restore point (image, increment): copies of the disks by their id
    truth: dict[tuple[int, int], dict[int, Path]] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A backup that was begun, and copies of the disks as they are at that moment."""

    vm: SiteVm
    copies: dict[int, Path]
    operation_id: str


class Site:
    """Everything in it ends with `close`."""

    def __init__(self, netlab: Netlab, product: Product) -> None:
        self.netlab = netlab
        self.product = product
        self.vms: list[SiteVm] = []
        self._numbers = itertools.count()
        self._api = Client(product.run_dir / "api/daemon.sock")
        self.restores = netlab["daemon"].own / "restores"
        self.truths = netlab["daemon"].own / "truths"
        for path in (self.restores, self.truths):
            path.mkdir()
        password = netlab["daemon"].own / "password"
        password.write_text(PASSWORD)
        self._password = password

    # --- making it

    def add_store(self, driver: str, *, size: str = "") -> Path:
        """A datastore named after its driver on the backup server; its directory there, as seen from here.

        With `size` it is a small file system.
        """
        backup = self.netlab["backup"]
        backup.run(["mkdir", f"/srv/{driver}"])
        if size:
            backup.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", f"/srv/{driver}"])
        values = {
            "rsync": ["RSYNC_HOST=backup", "RSYNC_USER=root"],
            "restic": [
                "RESTIC_SFTP_SERVER=backup", "RESTIC_SFTP_USER=root", f"RESTIC_PASSWORD=@{self._password}",
            ],
        }[driver]  # fmt: skip
        self.product.run(
            "datastore", "create", driver, "--driver", driver, "--accept-host-key", backup.fingerprint,
            f"BASE_PATH=/srv/{driver}", *values,
        )  # fmt: skip
        return backup.root / "srv" / driver

    def add_vms(self, *places: tuple[str, str], data_mib: int = 64) -> None:
        """VMs on (machine, store), booted side by side; what is backed up is the data disk."""
        for machine in dict.fromkeys(name for name, _ in places):
            self._add_host(self.netlab[machine])
        guests = [self._defined(number, machine, data_mib) for number, (machine, _) in enumerate(places)]
        for guest in guests:
            guest.start()
        for number, ((machine, store), guest) in enumerate(zip(places, guests, strict=True)):
            guest.wait_ready()
            self.product.run("vm", "import", machine, guest.name)
            vm = SiteVm(guest, number, store)
            self.vms.append(vm)
            self.configure(vm, "MODE=INCREMENT", "FS_FREEZE=NONE", "DISK_IDS=1")

    def configure(self, vm: SiteVm, *values: str) -> None:
        """`vm set`."""
        self.product.run("vm", "set", str(vm.number), *values)

    def close(self) -> None:
        """Destroy the guests, empty the server's stores."""
        for vm in self.vms:
            vm.guest.destroy()
            shutil.rmtree(vm.guest.directory, ignore_errors=True)
        for path in (self.restores, self.truths):
            shutil.rmtree(path, ignore_errors=True)
        for driver in STORES:
            place = f"/srv/{driver}"
            self.netlab["backup"].run(["umount", "--lazy", place], check=False)
            self.netlab["backup"].run(["rm", "-rf", place])

    # --- work

    def write(self, vm: SiteVm, name: str, kib: int = 256) -> None:
        """New random content in the guest, on its disk."""
        vm.guest.shell(f"dd if=/dev/urandom of=/data/vdb/{name} bs=1k count={kib} 2>/dev/null; sync")

    def back_up(self, vms: list[SiteVm]) -> list[dict[str, Any]]:
        """Back up VMs side by side; their operations."""
        with ThreadPoolExecutor(len(vms)) as pool:
            return list(pool.map(self.back_up_one, vms))

    def back_up_one(self, vm: SiteVm) -> dict[str, Any]:
        """A backup that succeeds, of a guest that stands still; the truth about it is kept."""
        ended = self.finish(self.begin(vm))
        assert ended["state"] == "DONE", ended["error"]
        return ended

    def begin(self, vm: SiteVm) -> Running:
        """Begin a backup of a guest that stands still."""
        return Running(vm, self._copied(vm), self._submit(vm))

    def finish(self, running: Running) -> dict[str, Any]:
        """The operation when it has ended; the guest goes on, and the truth is kept if there is a backup."""
        ended = self.ended(running.operation_id)
        if running.vm.guest.is_active():
            running.vm.guest.resume()
        if ended["state"] == "DONE":
            running.vm.truth[ended["result"]["image_id"], ended["result"]["increment_id"]] = running.copies
        return ended

    def _submit(self, vm: SiteVm) -> str:
        return str(
            self._api.post(
                f"vms/{vm.number}/backup", {"datastore_id": self._api.resolve("datastore", vm.store)}
            )["id"]
        )

    def operation(self, operation_id: str) -> dict[str, Any]:
        """An operation as it stands."""
        shown: dict[str, Any] = self._api.get(f"operations/{operation_id}")
        return shown

    def ended(self, operation_id: str, timeout_s: float = 120) -> dict[str, Any]:
        """An operation that has ended."""

        def final() -> dict[str, Any] | None:
            shown = self.operation(operation_id)
            return shown if shown["state"] in {"DONE", "FAILED", "CANCELLED"} else None

        found: dict[str, Any] = wait_for(f"end of {operation_id}", final, timeout_s)
        return found

    def is_troubled(self, operation_id: str) -> bool:
        """Whether the operation has failed, or waits to try something again."""
        shown = self.operation(operation_id)
        return shown["state"] == "FAILED" or (shown["progress"] or {}).get("step") == "WAIT"

    def settle(self, timeout_s: float = 120) -> list[dict[str, Any]]:
        """All operations, when none is queued or running any more."""

        def all_final() -> list[dict[str, Any]] | None:
            listed: list[dict[str, Any]] = self._api.get("operations")
            return None if any(one["state"] in {"QUEUED", "RUNNING"} for one in listed) else listed

        found: list[dict[str, Any]] = wait_for("end of all operations", all_final, timeout_s)
        return found

    # --- looking

    def points(self, vm: SiteVm) -> list[tuple[int, int]]:
        """The VM's restore points in the catalogue: (image, increment)."""
        return [(point["image_id"], point["increment_id"]) for point in self.increments(vm)]

    def increments(self, vm: SiteVm) -> list[dict[str, Any]]:
        """The same as the catalogue has them."""
        images = [one["id"] for one in self._api.get("images") if one["vm_id"] == vm.number]
        return [point for image in images for point in self._api.get(f"images/{image}")["increments"]]

    def assert_restores(self, vm: SiteVm, point: tuple[int, int]) -> None:
        """The restore point has the bytes that were there."""
        image, increment = point
        target = self.restores / f"{image}-{increment}"
        body = {"to": str(target), "increment_id": increment, "format": "raw"}
        ended = self.ended(self._api.post(f"images/{image}/restore", body)["id"])
        assert ended["state"] == "DONE", ended["error"]
        for disk_id, copy in vm.truth[point].items():
            (restored,) = target.glob(f"disk.{disk_id}*.raw")
            said = command("qemu-img", "compare", "-f", "raw", "-F", "qcow2", str(restored), str(copy))
            assert said == "Images are identical.\n"
        shutil.rmtree(target)

    # --- within

    def _add_host(self, machine: Machine) -> None:
        machine.libvirtd.connection.getHostname()  # starts it
        if machine.name == "daemon":
            self.product.run("host", "add", machine.name, "--uri", "qemu:///system")
            return
        uri = f"qemu+ssh://root@{machine.name}/system"
        self.product.run(
            "host", "add", machine.name, "--uri", uri, "--tm", "ssh", "--accept-host-key", machine.fingerprint
        )

    def _defined(self, number: int, machine: str, data_mib: int) -> Guest:
        directory = Path(tempfile.mkdtemp(prefix="g", dir=self.netlab[machine].own))
        disks: list[LabDisk] = [root_disk(directory), data_disk(directory, data_mib)]
        return Guest(self.netlab[machine].libvirtd, directory, f"vm{number}", disks)

    def _copied(self, vm: SiteVm) -> dict[int, Path]:
        """The data disk as QEMU has it; a running guest stays suspended."""
        copy = self.truths / f"{vm.number}-{next(self._numbers)}-vdb"
        if vm.guest.is_active():
            vm.guest.suspend()
            made = vm.guest.push_copy(vm.guest.directory / "copy")
            made["vda"].unlink()
            shutil.move(made["vdb"], copy)
        else:
            subprocess.run(["qemu-img", "convert", "-O", "qcow2", vm.guest.disks[1].path, copy], check=True)
        return {1: copy}
