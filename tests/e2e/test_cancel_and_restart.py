"""A live backup that ends in mid-transfer, by the user or with the daemon: the guest and the chain go on.

The store is the real fs driver, held in the middle of a disk (see held/driver.py).
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backed_up_vm import command, processes
from lab import Guest, Libvirtd, data_disk, root_disk, wait_for
from product import DRIVERS, Product


class Site:
    """A running guest that is backed up, with a full backup in the store."""

    def __init__(self, libvirtd: Libvirtd, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.disks = directory / "vm"
        self._driver = held_driver(directory / "drivers")
        self._restores = itertools.count()
        self.disks.mkdir()
        self.store.mkdir()
        self.guest = Guest(libvirtd, self.disks, "web", [root_disk(self.disks), data_disk(self.disks, 64)])
        self.product = Product(directory, driver_dirs=[directory / "drivers"])

    def set_up(self) -> None:
        """Boot, and make the first backup."""
        self.guest.start()
        self.product.start()
        self.guest.wait_ready()
        self.product.run("host", "add", "local", "--uri", self.guest.uri)
        self.product.run("vm", "import", "local", "web")
        self.product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={self.store}")
        self.backup_and_compare("FULL")

    def tear_down(self) -> None:
        """End everything."""
        self.let_go()
        self.product.stop()
        self.guest.destroy()

    # --- backups

    def hold(self) -> str:
        """Begin a backup with a frozen guest, and return its operation's id when it is in mid-transfer."""
        self.product.run("vm", "set", "0", "FS_FREEZE=AGENT")
        self.guest.shell("head -c 3000000 /dev/urandom >/data/vdb/lost; sync")
        (self._driver / "hold").touch()
        (self._driver / "reached").unlink(missing_ok=True)
        operation = self.product.run("vm", "backup", "0", "--no-wait").strip()
        wait_for("disk that is written in part", (self._driver / "reached").exists)
        assert self.guest.has_backup_job()
        assert self.partials() != []
        return operation

    def let_go(self) -> None:
        """Do not hold backups any more."""
        (self._driver / "hold").unlink(missing_ok=True)

    def backup_and_compare(self, kind: str) -> None:
        """A backup of the suspended guest: all its disks of that type, and identical to QEMU's own copy."""
        self.product.run("vm", "set", "0", "FS_FREEZE=NONE")
        self.guest.suspend()
        truth = self.guest.push_copy(self.directory / f"truth-{next(self._restores)}")
        result = self.product.ask("vm", "backup", "0")["result"]
        self.guest.resume()
        assert [disk["type"] for disk in result["disks"]] == [kind, kind]
        self.compare(result["increment_id"], list(truth.values()))

    def compare(self, increment: int, truth: list[Path]) -> list[Path]:
        """The increment restores to the disks given; the restored ones."""
        target = self.directory / f"restored-{next(self._restores)}"
        self.product.run("image", "restore", "0", "--increment", str(increment), "--to", str(target))
        restored = [target / f"disk.{disk_id}.qcow2" for disk_id in (0, 1)]
        for one, other in zip(restored, truth, strict=True):
            said = command("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(one), str(other))
            assert said == "Images are identical.\n"
        return restored

    # --- what must be so afterwards

    def operation(self, operation_id: str) -> Any:
        """An operation that has ended."""
        shown = self.product.call("operation", "show", operation_id, "--wait", "--json")
        return json.loads(shown.stdout)  # its exit code is that of the operation

    def partials(self) -> list[Path]:
        """What lies in the store unfinished."""
        return list(self.store.glob("*/.*"))

    def assert_nothing_left(self, checkpoints: list[str]) -> None:
        """The guest runs and writes; of the backup there is no trace on the host or in the store."""
        assert not self.guest.has_backup_job()
        assert not self.guest.is_paused()
        assert self.guest.agent("guest-fsfreeze-status") == "thawed"
        assert self.guest.shell("echo on >/data/vdb/on; sync; cat /data/vdb/on") == "on"
        assert self.checkpoints() == checkpoints
        assert self.partials() == []
        nbd = self.product.run_dir / "nbd"
        assert list(nbd.iterdir()) == []
        wait_for("end of all processes", lambda: not processes(nbd), 10)
        assert [path.name for path in self.disks.iterdir() if path.name.startswith(".oned-backup")] == []
        assert list((self.product.state_dir / "work").iterdir()) == []
        assert command("virsh", "-c", self.guest.uri, "domjobinfo", "web").split() == ["Job", "type:", "None"]
        wait_for("end of the drivers", lambda: str(self._driver) not in command("ps", "-eo", "args"), 10)

    def checkpoints(self) -> list[str]:
        """What libvirt lists."""
        domain = self.guest.libvirtd.connection.lookupByName("web")
        return sorted(checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0))

    def points(self) -> list[str]:
        """The names of the restore points, as the catalogue has them; the store has no others."""
        points = self.product.ask("image", "show", "0")["increments"]
        assert len(points) == len(list(self.store.glob("0/*")))
        return [point["type"] for point in points]


def held_driver(directory: Path) -> Path:
    """A copy of the fs driver that can be held."""
    folder = directory / "datastore" / "fs"
    shutil.copytree(DRIVERS / "datastore" / "fs", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "driver.py").rename(folder / "real.py")
    shutil.copy(Path(__file__).parent / "held" / "driver.py", folder)
    return folder


@pytest.fixture(scope="module")
def site(libvirtd: Libvirtd) -> Iterator[Site]:
    """One guest for all tests here: each leaves it running, with a chain that goes on."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Site(libvirtd, directory)
    try:
        site.set_up()
        yield site
    finally:
        site.tear_down()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.guest
@pytest.mark.fault("concurrency", "cancel in mid-transfer on a real guest")
def test_a_backup_is_cancelled_in_mid_transfer(site: Site) -> None:
    before, points = site.checkpoints(), site.points()
    old = site.compare(0, sorted(site.directory.glob("truth-0-*")))
    operation_id = site.hold()
    said = site.product.run("vm", "backup-cancel", "0")
    site.let_go()
    assert said == f"backup {operation_id}: CANCELLED\n"
    site.assert_nothing_left(before)
    assert site.points() == points
    site.compare(0, old)
    site.backup_and_compare("INCREMENT")
    assert site.points() == [*points, "INCREMENT"]


@pytest.mark.guest
@pytest.mark.fault("daemon", "daemon killed while a real guest is in mid-transfer")
def test_the_daemon_is_killed_in_mid_transfer(site: Site) -> None:
    before, points = site.checkpoints(), site.points()
    operation_id = site.hold()
    site.product.kill()
    assert not site.guest.is_paused()
    site.product.start()
    ended = site.operation(operation_id)
    site.let_go()
    assert ended["state"] == "FAILED"
    assert ended["error"]["message"] == "daemon restarted in step STORE"
    site.assert_nothing_left(before)
    assert site.points() == points
    site.compare(0, sorted(site.directory.glob("truth-0-*")))
    site.backup_and_compare("INCREMENT")
    assert site.points() == [*points, "INCREMENT"]
