"""A daemon with a dummy host of many VMs, each with one small disk, and one fs datastore."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from product import Product

from oned_backup.cli.client import Client
from oned_backup.errors import OnedBackupError
from oned_backup.hypervisor.dummy import DummyHost
from oned_backup.sdk.folder_store import MARKER, MARKER_TEXT

_DISK_BYTES = 256 * 1024


class ManyVms:
    """The VMs are `vm-00000` and so on; `workers` operations run at a time, all on the one host."""

    def __init__(
        self, directory: Path, vms: int, *, driver_dirs: Sequence[Path] = (), workers: int = 8
    ) -> None:
        self.workers = workers
        self.product = Product(directory, driver_dirs=driver_dirs)
        self.product.settings(workers=workers, workers_per_host=workers)
        self.hypervisor = DummyHost(f"dummy://{directory}/host")
        for number in range(vms):
            self.hypervisor.create(f"vm-{number:05}", {"vda": _DISK_BYTES})
        self.store = directory / "store"
        self.store.mkdir()
        (self.store / MARKER).write_bytes(MARKER_TEXT)
        self.product.start()
        self.client = Client(self.product.run_dir / "api/daemon.sock")
        host = {"name": "sim", "uri": f"dummy://{self.hypervisor.root}", "vmm": "dummy", "tm": "dummy"}
        self.client.post("hosts", host)
        values = {"BASE_PATH": str(self.store)}
        self.client.post("datastores", {"name": "nightly", "driver": "fs", "values": values})

    def import_all(self) -> None:
        """Import all VMs, with one command."""
        self.product.run("vm", "import", "sim", "--all")

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
        states = []
        for one in ids:
            operation = self.client.get(f"operations/{one}")
            states.append(operation["state"])
            wanted = {"DONE": 1, "FAILED": 0}[operation["state"]]
            assert points[operation["vm_id"]] == wanted, operation
        assert states.count("FAILED") <= self.workers
        assert not [vm for vm in self.client.get("vms") if vm["state"] != "RUNNING"]
        assert len(self.client.get("images")) == states.count("DONE")
