"""A simulated VM that is backed up for real: dummy hypervisor, real daemon, real fs store, known content.

Everything but QEMU is the product's, so a fault anywhere in daemon, drivers or
store can be tried hundreds of times. What every disk held at each restore point
is known, and `assert_sound` says whether all that must hold after any fault does.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import wait_for
from product import Product

from oned_backup import failpoints
from oned_backup.cli.client import Client
from oned_backup.errors import OnedBackupError
from oned_backup.hypervisor.dummy import DummyHost

CLUSTER = 65536
SIZES = {"vda": 24 * CLUSTER, "vdb": 10 * CLUSTER + 512}
#: the daemon has this long to end what its predecessor left
RECOVERY_S = 30.0


@contextmanager
def simulation() -> Iterator[Simulation]:
    """A simulation with a chain of three, in a directory that goes with it."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Simulation(directory)
    try:
        site.set_up()
        yield site
    finally:
        site.tear_down()
        shutil.rmtree(directory, ignore_errors=True)


class Simulation:
    """One VM with two disks on a dummy host, and its backups."""

    def __init__(self, directory: Path, *, seed: int = 1) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.store.mkdir()
        self.random = random.Random(seed)
        self.hypervisor = DummyHost(f"dummy://{directory}/host")
        self.domain = self.hypervisor.create("web", SIZES)
        self.product = Product(directory)
        self.client = Client(self.product.run_dir / "api/daemon.sock")
        self._armed = directory / "armed"
        #: what the disks held, by image and increment
        self.truth: dict[tuple[int, int], list[bytes]] = {}
        self._restores = itertools.count()

    def set_up(self) -> None:
        """Start, register everything, make a chain of three."""
        self.arm()
        self.start()
        self.client.post(
            "hosts", {"name": "sim", "uri": f"dummy://{self.hypervisor.root}", "vmm": "dummy", "tm": "dummy"}
        )
        self.client.post("hosts/0/import", {"all": True})
        self.client.patch("vms/0/config", {"values": {"MODE": "INCREMENT", "FS_FREEZE": "AGENT"}})
        values = {"BASE_PATH": str(self.store)}
        self.client.post("datastores", {"name": "nightly", "driver": "fs", "values": values})
        for kind in ("FULL", "INCREMENT", "INCREMENT"):
            assert self.backup() == kind

    def tear_down(self) -> None:
        """End the daemon."""
        self.product.stop()

    def start(self) -> None:
        """A daemon that looks at our failpoints."""
        self.product.start({failpoints.VARIABLE: f"@{self._armed}"})

    def arm(self, armed: str = "") -> None:
        """From now on these failpoints act."""
        self._armed.write_text(armed)

    # --- the guest

    def content(self) -> list[bytes]:
        """What the disks hold now."""
        return [Path(disk.source).read_bytes() for disk in self.domain.disks]

    def write(self) -> None:
        """The guest writes: some clusters get data, some become zero."""
        for disk in self.domain.disks:
            with Path(disk.source).open("r+b") as file:
                for _ in range(4):
                    file.seek(self.random.randrange(disk.size_bytes // CLUSTER) * CLUSTER)
                    file.write(self.random.choice((bytes(CLUSTER), self.random.randbytes(CLUSTER))))

    # --- operations

    def submit(self, path: str, body: Mapping[str, Any] | None = None, *, method: str = "post") -> str:
        """The id of a new operation."""
        call: Callable[..., Any] = getattr(self.client, method)
        answer = call(path) if method == "delete" else call(path, body or {})
        return str(answer["id"])

    def ended(self, operation_id: str, timeout_s: float = 60) -> dict[str, Any]:
        """The operation once it is over; `LabError` if that takes longer."""
        wait_for(
            f"end of {operation_id}",
            lambda: self.state(operation_id, wait_s=5) in {"DONE", "FAILED", "CANCELLED"},
            timeout_s,
        )
        return dict(self.client.get(f"operations/{operation_id}"))

    def done(self, operation_id: str) -> dict[str, Any]:
        """The result of an operation that must succeed."""
        ended = self.ended(operation_id)
        assert ended["state"] == "DONE", json.dumps(ended, indent=1)
        return dict(ended["result"])

    def backup(self, **options: Any) -> str:
        """The type of a new backup, whose truth is kept."""
        self.write()
        result = self.done(self.submit("vms/0/backup", options))
        self.truth[result["image_id"], result["increment_id"]] = self.content()
        return str(result["type"])

    def restore(self, image_id: int, increment_id: int) -> list[bytes]:
        """The disks of a restore point."""
        target = self.directory / f"restored-{next(self._restores)}"
        body = {"to": str(target), "increment_id": increment_id, "format": "raw"}
        self.done(self.submit(f"images/{image_id}/restore", body))
        return [(target / f"disk.{disk_id}.raw").read_bytes() for disk_id in range(len(SIZES))]

    def flatten(self, increment_id: int) -> str:
        """The id of the operation that takes an increment out of the newest image."""
        return self.submit(f"images/{self.newest_image()}?increment_id={increment_id}", method="delete")

    def set(self, **values: str) -> None:
        """Settings of the VM."""
        self.client.patch("vms/0/config", {"values": values})

    def settle(self) -> None:
        """Wait until nothing is queued or running any more."""
        wait_for("end of all operations", self.is_idle, 60)

    def is_idle(self) -> bool:
        """Whether the daemon lives, has recovered, and has nothing to do."""
        return not self._open_operations()

    # --- the catalogue

    def operations(self, kind: str) -> list[dict[str, Any]]:
        """All operations of a kind, newest first."""
        return [row for row in self.client.get("operations", limit=1000) if row["kind"] == kind]

    def chain(self) -> list[int]:
        """The increments of the newest image."""
        return [point["increment_id"] for point in self.points() if point["image_id"] == self.newest_image()]

    def images(self) -> list[dict[str, Any]]:
        """All images with their restore points."""
        return [self.client.get(f"images/{row['id']}") for row in self.client.get("images")]

    def points(self) -> list[dict[str, Any]]:
        """All restore points, oldest first; `backup_id`, `image_id`, `increment_id`, `type`."""
        found = [
            {**increment, "image_id": image["id"]}
            for image in self.images()
            for increment in image["increments"]
        ]
        return sorted(found, key=lambda point: (point["image_id"], point["increment_id"]))

    def learn(self, content: list[bytes]) -> None:
        """A backup whose end nobody has seen, made when the disks held `content`."""
        for point in self.points():
            self.truth.setdefault((point["image_id"], point["increment_id"]), content)

    def url(self) -> str:
        """The pseudo-URL of the newest restore point's first disk."""
        return str(self.client.get(f"images/{self.newest_image()}/disks")[0]["url"])

    def newest_image(self) -> int:
        """The image with the active chain."""
        return max(int(image["id"]) for image in self.images())

    # --- what must hold after any fault

    def wait_recovered(self) -> None:
        """Every operation is over within the time that recovery has, and what it queued again as well."""
        began = time.monotonic()
        wait_for("end of all operations", self.is_idle, RECOVERY_S + 30)
        assert time.monotonic() - began < RECOVERY_S, "recovery took too long"

    def assert_sound(self, *, restore_all: bool = False) -> None:
        """Nothing is left behind, and what the catalogue has restores byte for byte."""
        assert self._open_operations() == []
        assert not self.hypervisor.find("web").frozen
        assert self._unfinished() == []
        points = self.points()
        known = {point["backup_id"] for point in points}
        assert {path.name for path in self.store.glob("0/*")} == known, "store and catalogue differ"
        keys = {(point["image_id"], point["increment_id"]) for point in points}
        assert keys <= self.truth.keys(), "a backup that nobody has seen finished"
        assert len(self._checkpoints()) <= len(SIZES)
        wait_for("end of all drivers", lambda: not self.drivers(), 10)
        assert list((self.product.state_dir / "work").iterdir()) == []
        assert list(self.product.run_dir.glob("op-*.lock")) == []
        for point in points if restore_all else points[-1:]:
            key = point["image_id"], point["increment_id"]
            assert self.restore(*key) == self.truth[key], f"{key} is another one"

    def _open_operations(self) -> list[str]:
        try:
            if not self.client.get("status")["recovered"]:
                return ["recovery"]
            rows = self.client.get("operations")
        except OnedBackupError:
            return ["no daemon answers"]
        return [row["id"] for row in rows if row["state"] in {"QUEUED", "RUNNING"}]

    def state(self, operation_id: str, wait_s: float = 0) -> str:
        """Where an operation stands; empty if no daemon answers."""
        try:
            return str(self.client.get(f"operations/{operation_id}", wait_s=wait_s)["state"])
        except OnedBackupError:
            return ""

    def _unfinished(self) -> list[Path]:
        return list(self.store.glob("*/.*"))

    def _checkpoints(self) -> list[Path]:
        return [
            path
            for disk in self.domain.disks
            for path in Path(disk.source).parent.glob(f"{Path(disk.source).name}.*")
        ]

    def drivers(self) -> list[int]:
        """The drivers of our daemons that live."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdecimal() and (process / "cwd").readlink().is_relative_to(
                    self.product.state_dir
                ):
                    found.append(int(process.name))
            except OSError:  # it has ended meanwhile
                continue
        return found
