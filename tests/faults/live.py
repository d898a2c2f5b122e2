"""A real guest on a real libvirt, backed up by a daemon with failpoints, and what must hold after a fault.

What a restore point holds is known from QEMU: `backup_and_compare` has it copy the suspended guest's disks
itself, and compares. A point that was compared once is compared with what it was from then on.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
import libvirt_qemu
from backed_up_vm import command, compare
from blake3 import blake3
from lab import Guest, Libvirtd, data_disk, root_disk, wait_for

from tests.faults.daemon_site import DaemonSite

DISKS = ("vda", "vdb")


@contextmanager
def live_site(libvirtd: Libvirtd, *, running: bool = True) -> Iterator[LiveSite]:
    """A guest with a chain of two, in a directory that goes with it."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = LiveSite(directory, libvirtd)
    try:
        site.set_up(running=running)
        yield site
    finally:
        site.tear_down()
        shutil.rmtree(directory, ignore_errors=True)


class LiveSite(DaemonSite):
    """One guest with two disks, and its backups."""

    def __init__(self, directory: Path, libvirtd: Libvirtd) -> None:
        super().__init__(directory)
        self.libvirtd = libvirtd
        self.disks = directory / "vm"
        self.disks.mkdir()
        self.guest = Guest(libvirtd, self.disks, "web", [root_disk(self.disks), data_disk(self.disks, 64)])
        self._numbers = itertools.count()
        #: of the disks of every restore point that was seen, by image and increment
        self.known: dict[tuple[int, int], str] = {}

    def set_up(self, *, running: bool) -> None:
        """Boot, register everything, make a chain of two."""
        self.arm()
        self.guest.start()
        self.start()
        self.guest.wait_ready()
        self.client.post("hosts", {"name": "local", "uri": self.guest.uri})
        self.client.post("hosts/0/import", {"domains": ["web"]})
        values = {"BASE_PATH": str(self.store)}
        self.client.post("datastores", {"name": "nightly", "driver": "fs", "values": values})
        if not running:
            self.guest.stop()
        assert self.backup_and_compare() == "FULL"
        assert self.backup_and_compare() == "INCREMENT"

    def tear_down(self) -> None:
        """End everything."""
        super().tear_down()
        self.guest.destroy()

    # --- the guest

    def write(self) -> None:
        """The guest writes something new, while it runs; its data disk changes while it is off."""
        if self.guest.is_active():
            self.guest.shell("head -c 1000000 /dev/urandom >/data/vdb/new; echo $$ >/root/new; sync")
        else:
            path = str(self.guest.disks[1].path)
            offset = 65536 * (next(self._numbers) % 64)
            command(
                "qemu-io", "-f", "qcow2", "-c", f"write -P {offset // 65536 % 251 + 1} {offset} 65536", path
            )

    def is_thawed(self) -> bool:
        """Whether the agent says so; libvirt may have lost it for a moment."""
        try:
            return bool(self.guest.agent("guest-fsfreeze-status") == "thawed")
        except libvirt.libvirtError:
            return False

    def checkpoints(self) -> list[str]:
        """What libvirt lists."""
        domain = self.libvirtd.connection.lookupByName("web")
        return sorted(checkpoint.getName() for checkpoint in domain.listAllCheckpoints(0))

    def bitmaps(self) -> dict[str, list[str]]:
        """The bitmaps of each disk: those that QEMU has in memory, or in the image of a guest that is off."""
        if not self.guest.is_active():
            return {
                target: sorted(_bitmaps_in(disk.path)) for target, disk in self.guest.writable_disks().items()
            }
        domain = self.libvirtd.connection.lookupByName("web")
        query = json.dumps({"execute": "query-named-block-nodes", "arguments": {"flat": True}})
        nodes = json.loads(libvirt_qemu.qemuMonitorCommand(domain, query, 0))["return"]
        return {
            target: sorted(
                bitmap["name"]
                for node in nodes
                if node["file"] == str(disk.path) and node["drv"] == disk.format
                for bitmap in node.get("dirty-bitmaps", [])
            )
            for target, disk in self.guest.writable_disks().items()
        }

    # --- backups

    def backup_and_compare(self) -> str:
        """The type of a backup of the suspended guest, or one that is off: identical to QEMU's own copy."""
        self.write()
        self.set(FS_FREEZE="NONE")
        truth = self.directory / f"truth-{next(self._numbers)}"
        if self.guest.is_active():
            self.guest.suspend()
            copies = self.guest.push_copy(truth)
            result = self.done(self.submit("vms/0/backup"))
            self.guest.resume()
        else:
            copies = {target: disk.path for target, disk in self.guest.writable_disks().items()}
            result = self.done(self.submit("vms/0/backup"))
        kinds = {disk["type"] for disk in result["disks"]}
        key = result["image_id"], result["increment_id"]
        restored = self._restored(*key)
        for path, copy in zip(restored, copies.values(), strict=True):
            compare(path, copy)
        self.known[key] = _digest(restored)
        shutil.rmtree(restored[0].parent)
        for copy in self.directory.glob(f"{truth.name}-*"):
            copy.unlink()
        assert len(kinds) == 1, result["disks"]
        return str(kinds.pop())

    def learn(self) -> None:
        """Take restore points that nobody has seen finished for what they are: they restore."""
        for point in self.points():
            key = point["image_id"], point["increment_id"]
            if key not in self.known:
                self.known[key] = self.digest(*key)

    def digest(self, image_id: int, increment_id: int) -> str:
        """Of the disks of a restore point."""
        restored = self._restored(image_id, increment_id)
        try:
            return _digest(restored)
        finally:
            shutil.rmtree(restored[0].parent)

    def drop_old_images(self) -> None:
        """Remove all but the newest image, so that no row takes longer than the first."""
        for image in self.images()[:-1]:
            self.assert_known(max(key for key in self.known if key[0] == image["id"]))
            self.done(self.submit(f"images/{image['id']}", method="delete"))
            self.known = {key: value for key, value in self.known.items() if key[0] != image["id"]}

    def _restored(self, image_id: int, increment_id: int) -> list[Path]:
        target = self.directory / f"restored-{next(self._numbers)}"
        body = {"to": str(target), "increment_id": increment_id, "format": "raw"}
        self.done(self.submit(f"images/{image_id}/restore", body))
        return [target / f"disk.{disk_id}.raw" for disk_id in range(len(DISKS))]

    # --- what must hold after any fault

    def assert_guest_goes_on(self) -> None:
        """The guest runs, is thawed and writes; it has no job."""
        assert not self.guest.is_paused()
        assert self.is_thawed()
        assert self.guest.shell("echo on >/data/vdb/on; sync; cat /data/vdb/on") == "on"
        assert not self.guest.has_backup_job()
        domain = self.libvirtd.connection.lookupByName("web")
        assert domain.jobInfo()[0] == libvirt.VIR_DOMAIN_JOB_NONE

    def assert_sound(self, *, running: bool = True) -> None:
        """Of what died there is no trace, and the guest goes on."""
        if running:
            self.assert_guest_goes_on()
        else:
            assert not self.guest.is_active()
        self.assert_tidy()
        nbd = self.product.run_dir / "nbd"
        assert not nbd.exists() or list(nbd.iterdir()) == []
        wait_for("end of all processes", lambda: not self.processes(), 10)
        assert [path.name for path in self.disks.iterdir() if path.name.startswith(".oned-backup")] == []
        assert str(self.directory) not in Path("/proc/self/mountinfo").read_text()
        kept = [f"odb-{self._installation()}-{self.points()[-1]['backup_id']}"]
        own = {
            target: [name for name in names if name.startswith("odb-")]
            for target, names in self.bitmaps().items()
        }
        assert own == dict.fromkeys(DISKS, kept)
        assert [name for name in self.checkpoints() if name.startswith("odb-")] in ([], kept)

    def assert_known(self, key: tuple[int, int]) -> None:
        """A restore point, by image and increment, is what it was."""
        assert self.digest(*key) == self.known[key], f"{key} is another one"

    def freezing(self) -> list[int]:
        """The drivers that are at the beginning of a backup."""
        return [
            pid for pid in self.drivers() if b"pre_backup_live" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def processes(self) -> list[str]:
        """Everything of ours that has to do with this guest: servers, watchmen, guardians."""
        ours = ("qemu-nbd", "oned_backup.transfer", "oned_backup.hypervisor")
        lines = command("ps", "-ewwo", "args").splitlines()
        marks = (self.guest.uuid, str(self.directory))
        return [
            line
            for line in lines
            if any(name in line for name in ours) and any(mark in line for mark in marks)
        ]

    def _installation(self) -> str:
        return str(self.client.get("status")["installation"])


def _bitmaps_in(path: Path) -> list[str]:
    said = json.loads(command("qemu-img", "info", "--output=json", "-f", "qcow2", str(path)))
    return [bitmap["name"] for bitmap in said["format-specific"]["data"].get("bitmaps", [])]


def _digest(paths: list[Path]) -> str:
    return " ".join(blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest() for path in paths)
