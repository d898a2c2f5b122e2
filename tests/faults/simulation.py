"""A simulated VM that is backed up for real: dummy hypervisor, real daemon, real fs store, known content.

Everything but QEMU is the product's, so a fault anywhere in daemon, drivers or
store can be tried hundreds of times. What every disk held at each restore point
is known, and `assert_sound` says whether all that must hold after any fault does.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from oned_backup.hypervisor.dummy import DummyHost
from tests.faults.daemon_site import DaemonSite

CLUSTER = 65536
SIZES = {"vda": 24 * CLUSTER, "vdb": 10 * CLUSTER + 512}


@contextmanager
def simulation(
    *, store_mb: int = 0, disk: Callable[[Path], AbstractContextManager[Any]] | None = None
) -> Iterator[Simulation]:
    """A simulation with a chain of three, in a directory that goes with it.

    With `store_mb` the store is a file system of its own, of that size; `disk` mounts one for it.
    """
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        site = Simulation(directory)
        if store_mb:
            stack.enter_context(_mounted(directory / "store.ext4", site.store, store_mb))
        if disk is not None:
            site.disk = stack.enter_context(disk(site.store))
        stack.callback(site.tear_down)
        site.set_up()
        yield site


@contextmanager
def _mounted(image: Path, place: Path, size_mb: int) -> Iterator[None]:
    with image.open("wb") as file:
        file.truncate(size_mb << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    shutil.rmtree(place / "lost+found")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


class Simulation(DaemonSite):
    """One VM with two disks on a dummy host, and its backups."""

    def __init__(self, directory: Path, *, seed: int = 1) -> None:
        super().__init__(directory)
        self.random = random.Random(seed)
        self.hypervisor = DummyHost(f"dummy://{directory}/host")
        self.domain = self.hypervisor.create("web", SIZES)
        #: what the disks held, by image and increment
        self.truth: dict[tuple[int, int], list[bytes]] = {}
        self._restores = itertools.count()
        #: what the store lies on, if `simulation` was told to make one
        self.disk: Any = None

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

    def learn(self, content: list[bytes]) -> None:
        """A backup whose end nobody has seen, made when the disks held `content`."""
        for point in self.points():
            self.truth.setdefault((point["image_id"], point["increment_id"]), content)

    def url(self) -> str:
        """The pseudo-URL of the newest restore point's first disk."""
        return str(self.client.get(f"images/{self.newest_image()}/disks")[0]["url"])

    # --- what must hold after any fault

    def assert_sound(self, *, restore_all: bool = False) -> None:
        """Nothing is left behind, and what the catalogue has restores byte for byte."""
        self.assert_tidy()
        assert not self.hypervisor.find("web").frozen
        points = self.points()
        keys = {(point["image_id"], point["increment_id"]) for point in points}
        assert keys <= self.truth.keys(), "a backup that nobody has seen finished"
        assert len(self._checkpoints()) <= len(SIZES)
        for point in points if restore_all else points[-1:]:
            key = point["image_id"], point["increment_id"]
            assert self.restore(*key) == self.truth[key], f"{key} is another one"

    def _checkpoints(self) -> list[Path]:
        return [
            path
            for disk in self.domain.disks
            for path in Path(disk.source).parent.glob(f"{Path(disk.source).name}.*")
        ]
