"""A daemon with dummy hosts of many VMs, each with one small disk, and one fs datastore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from product import Product

from oned_backup.client import Client
from oned_backup.errors import OnedBackupError
from oned_backup.hypervisor.dummy import DummyHost
from oned_backup.sdk.folder_store import MARKER, MARKER_TEXT

_DISK_BYTES = 256 * 1024
_VMS_OF_HOST = 500


class ManyVms:
    """The VMs are `vm-00000` and so on; `workers` operations run at a time, on any host."""

    def __init__(
        self, directory: Path, vms: int, *, driver_dirs: Sequence[Path] = (), workers: int = 8
    ) -> None:
        self.workers = workers
        self.product = Product(directory, driver_dirs=driver_dirs)
        self.product.settings(workers=workers, workers_per_host=workers)
        self.hosts = [DummyHost(f"dummy://{directory}/host-{first}") for first in range(0, vms, _VMS_OF_HOST)]
        for number in range(vms):
            self.hosts[number // _VMS_OF_HOST].create(f"vm-{number:05}", {"vda": _DISK_BYTES})
        self.store = directory / "store"
        self.store.mkdir()
        (self.store / MARKER).write_bytes(MARKER_TEXT)
        self.product.start()
        self.client = Client(self.product.run_dir / "api/daemon.sock")
        for host in self.hosts:
            uri = f"dummy://{host.root}"
            self.client.post("hosts", {"name": host.root.name, "uri": uri, "vmm": "dummy", "tm": "dummy"})
        values = {"BASE_PATH": str(self.store)}
        self.client.post("datastores", {"name": "nightly", "driver": "fs", "values": values})

    def import_all(self) -> None:
        """Import all VMs, with one command a host."""
        for host in self.hosts:
            self.product.run("vm", "import", host.root.name, "--all")

    def queue(self, vms: Sequence[int]) -> list[str]:
        """A backup of each of these VMs, queued; the operations' ids."""
        return [str(self.client.post(f"vms/{vm}/backup", {})["id"]) for vm in vms]

    def open_operations(self) -> int:
        """How many operations are not over; -1 if no daemon answers, or it has not recovered yet."""
        try:
            status = self.client.get("status")
        except OnedBackupError:
            return -1
        return int(status["queued"] + status["running"]) if status["recovered"] else -1

    def ends(self, ids: Sequence[str]) -> Counter[str]:
        """How these operations ended."""
        return Counter(str(self.client.get(f"operations/{one}")["state"]) for one in ids)

    def assert_each_once(self, ids: Sequence[str]) -> None:
        """Each backup is over; a VM has one restore point if its backup is DONE, and else none.

        No more have failed than were running when the daemon died.
        """
        points = {vm["id"]: vm["backups"] for vm in self.client.get("vms")}
        images = Counter(image["vm_id"] for image in self.client.get("images"))
        states = []
        for one in ids:
            operation = self.client.get(f"operations/{one}")
            states.append(operation["state"])
            wanted = {"DONE": 1, "FAILED": 0}[operation["state"]]
            assert points[operation["vm_id"]] == images[operation["vm_id"]] == wanted, operation
        assert states.count("FAILED") <= self.workers
        assert not [vm for vm in self.client.get("vms") if vm["state"] != "RUNNING"]
