"""Rows about stores on a server: rsync and restic over SSH, beside a staged qcow2 that the same tool sends.

The peers work as OpenNebula does: a full is `qemu-img convert` into a staged file, an increment
has the dirty extents copied into one by qemu-io; then `rsync`, or `restic backup --force`, sends
it. virtnbdbackup runs on the server and reaches the hypervisor's libvirt by SSH and its disks by
NBD over TCP, as its manual has it for a remote host, which is not encrypted. It also copies the kernel
and the initrd that our guests boot from, 14 MiB each time.
Daemon and server are machines in namespaces with a real sshd between them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import netlab
from netlab import Netlab
from product import Product

from oned_backup.client import Client
from tests.bench.machines import Data, Machine, build_disk, dirty_all
from tests.bench.product import RssWatch, SpaceWatch
from tests.bench.table import Row, compared

MIB = 1 << 20
_PASSWORD = "bench"  # noqa: S105
#: the design's: ours takes at most this much of the peer's time
_BARS = {("restic", "1 %"): 0.9, ("restic", "20 %"): 0.7, ("restic", "full"): 0.7}


def measure(data: Data, percents: Sequence[float], runs: int) -> list[Row]:
    """All rows of both stores."""
    rows: list[Row] = []
    with Netlab(["daemon", "backup"]) as lab:
        home = lab["daemon"].own
        template = home / "template.qcow2"
        build_disk(template, data, seed=1)
        for name, (tool, make_peer) in PEERS.items():
            machines = [
                Machine(lab["daemon"].libvirtd, home / f"{who}-{name}", f"{who}-{name}", template)
                for who in ("ours", "peer")
            ]
            ours = Ours(lab, tool, machines[0], home / f"p-{name}")
            try:
                peer = make_peer(lab, machines[1], home / f"staged-{name}")
                rows += _rows(tool, ours, peer, machines, data, percents, runs)
            finally:
                ours.product.stop()
                for machine in machines:
                    machine.remove()
    return rows


@dataclass
class _Turn:
    """What one backup took."""

    seconds: float
    sent_bytes: int
    stored_bytes: int


@dataclass
class _Side:
    """All turns of one side at one kind of backup."""

    turns: list[_Turn] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [turn.seconds for turn in self.turns]

    def middle(self, name: str) -> int:
        return int(median(getattr(turn, name) for turn in self.turns))


def _rows(
    tool: str,
    ours: Ours,
    peer: Peer,
    machines: list[Machine],
    data: Data,
    percents: Sequence[float],
    runs: int,
) -> Iterator[Row]:
    for name, share in [("full", -1.0), ("unchanged", 0.0), *((f"{p:g} %", p) for p in percents)]:
        mine, theirs = _Side(), _Side()
        with RssWatch("backup") as memory, SpaceWatch(machines[0].directory) as scratch:
            for turn in range(runs):
                if share > 0:
                    dirty_all(machines, data, share, turn)
                if share < 0:
                    ours.renew()
                    peer.renew()
                with ours.counted(mine):
                    ours.backup(full=share < 0)
                with peer.counted(theirs):
                    peer.backup(full=share < 0)
        label = f"{tool}, {name}"
        yield compared(
            f"{label} / {peer.label}",
            mine.seconds,
            theirs.seconds,
            bar=_BARS.get((tool, name)),
            moved=mine.middle("sent_bytes"),
            rss_mib=memory.peak_mib,
        )
        for what in ("sent", "stored"):
            here, there = (side.middle(f"{what}_bytes") / MIB for side in (mine, theirs))
            yield Row(
                f"{label}: {what} / {peer.label}: {there:.1f} MiB",
                round(here, 1),
                ratio=round(here / max(there, 0.1), 2),
                bar=1.05 if (tool, what) == ("restic", "stored") and there > 1 else None,
                unit="MiB",
            )
        yield Row(
            f"{label}: temporary space / {peer.label}: {peer.staged_bytes / MIB:.1f} MiB",
            round(scratch.peak_bytes / MIB, 1),
            unit="MiB",
        )


class _Counted:
    """What a backup takes: time, bytes through the server's network card, bytes on its disk."""

    def __init__(self, server: netlab.Machine, place: str) -> None:
        self.server, self.place = server, place
        server.run(["mkdir", "-p", place])

    @contextmanager
    def counted(self, side: _Side) -> Iterator[None]:
        """Enter a turn of one side."""
        sent, stored, started = self._received(), self._stored(), time.monotonic()
        yield
        seconds = time.monotonic() - started
        side.turns.append(_Turn(seconds, self._received() - sent, self._stored() - stored))

    def _received(self) -> int:
        lines = Path(f"/proc/{self.server.pid}/net/dev").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.strip().startswith("eth0:"))

    def _stored(self) -> int:
        root = self.server.root / self.place.lstrip("/")
        return sum(path.lstat().st_blocks * 512 for path in root.rglob("*"))


class Ours(_Counted):
    """A daemon with one VM and one store on the server."""

    def __init__(self, lab: Netlab, tool: str, machine: Machine, directory: Path) -> None:
        server, place = lab["backup"], f"/srv/{directory.name}"
        super().__init__(server, place)
        directory.mkdir()
        self.product = Product(directory, machine=lab["daemon"])
        self.product.start()
        password = directory / "password"
        password.write_text(_PASSWORD)
        where = "RSYNC_HOST=backup RSYNC_USER=root"
        if tool == "restic":
            where = f"RESTIC_SFTP_SERVER=backup RESTIC_SFTP_USER=root RESTIC_PASSWORD=@{password}"
        self._parameters = ["--driver", tool, "--accept-host-key", server.fingerprint, *where.split()]
        self.product.run("host", "add", "here", "--uri", "qemu:///system")
        self.product.run("vm", "import", "here", machine.name)
        self.product.run("vm", "set", "0", "MODE=INCREMENT", "FS_FREEZE=NONE", "DISK_IDS=1")
        self._api = Client(self.product.run_dir / "api/daemon.sock")
        self._store = -1

    def renew(self) -> None:
        """From now on backups go to a store that has nothing yet."""
        number = self._store + 1
        place = f"{self.place}/{number}"
        self.server.run(["mkdir", place])
        self.product.run("datastore", "create", f"store-{number}", *self._parameters, f"BASE_PATH={place}")
        self._store = self._api.resolve("datastore", f"store-{number}")

    def backup(self, *, full: bool) -> None:
        """A backup that has ended well, of the kind that was wanted."""
        operation: Any = self._api.post("vms/0/backup", {"datastore_id": self._store, "reset": full})
        while operation["ended_at"] is None:
            operation = self._api.get(f"operations/{operation['id']}", wait_s=5, seen=operation["version"])
        if operation["state"] != "DONE" or (operation["result"]["type"] == "FULL") != full:
            raise RuntimeError(f"not what was wanted: {operation}")


class Peer(_Counted):
    """The other side."""

    label = ""
    #: the most that it had staged of one backup
    staged_bytes = 0

    def renew(self) -> None:
        """From now on backups go to a place that has nothing yet."""

    def backup(self, *, full: bool) -> None:
        """A backup that is durable."""
        raise NotImplementedError


class Staged(Peer):
    """A staged qcow2, sent by a tool."""

    tool = ""

    def __init__(self, lab: Netlab, machine: Machine, directory: Path) -> None:
        super().__init__(lab["backup"], f"/srv/peer-{self.tool}")
        directory.mkdir()
        self._daemon, self._machine, self._directory = lab["daemon"], machine, directory
        self._number = 0

    def send(self, staged: Path) -> None:
        """Send the staged file, durably."""
        raise NotImplementedError

    def backup(self, *, full: bool) -> None:
        """Stage, send, remove what was staged."""
        staged = self._directory / f"disk.0.{self._number}"
        if full:
            self._forget()
            self._checkpoint()
            self._run("qemu-img", "convert", "-m", "4", "-O", "qcow2", "-U", self._machine.disk, staged)
        else:
            self._copy_dirty(staged)
        self.staged_bytes = staged.stat().st_blocks * 512
        self.send(staged)
        staged.unlink()
        self._number += 1

    def _copy_dirty(self, staged: Path) -> None:
        socket, scratch = self._directory / "nbd.sock", self._directory / "scratch"
        begin = (
            f"<domainbackup mode='pull'><incremental>{self._name(-1)}</incremental>"
            f"<server transport='unix' socket='{socket}'/><disks><disk name='vda' backup='no'/>"
            f"<disk name='vdb' backup='yes' type='file'><scratch file='{scratch}'/></disk>"
            "</disks></domainbackup>"
        )
        domain = self._machine.domain
        domain.backupBegin(begin, self._checkpoint_xml(), 0)
        export = f"nbd+unix:///vdb?socket={socket}"
        try:
            mapped = self._run("nbdinfo", "--json", "--map=qemu:dirty-bitmap:backup-vdb", export)
            dirty = [extent for extent in json.loads(mapped) if extent["type"]]
            self._run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", export, staged)
            reads = "".join(f"read -q {one['offset']} {one['length']}\n" for one in dirty)
            self._run("qemu-io", "-C", "-t", "none", "-f", "qcow2", staged, stdin=reads)
        finally:
            domain.abortJob()
            scratch.unlink(missing_ok=True)
        domain.checkpointLookupByName(self._name(-1)).delete()
        self._run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", staged)

    def _checkpoint(self) -> None:
        self._machine.domain.checkpointCreateXML(self._checkpoint_xml(), 0)

    def _checkpoint_xml(self) -> str:
        return (
            f"<domaincheckpoint><name>{self._name(0)}</name><disks><disk name='vda' checkpoint='no'/>"
            "<disk name='vdb' checkpoint='bitmap'/></disks></domaincheckpoint>"
        )

    def _forget(self) -> None:
        for checkpoint in self._machine.domain.listAllCheckpoints():
            checkpoint.delete()

    def _name(self, offset: int) -> str:
        return f"one-{self._number + offset}"

    def _run(self, *argv: str | Path, stdin: str = "") -> str:
        done = self._daemon.run(argv, stdin=stdin.encode(), timeout_s=600)
        return done.stdout.decode()


class StagedRsync(Staged):
    """Plain rsync."""

    tool = "rsync"
    label = "staged qcow2 by rsync"

    def send(self, staged: Path) -> None:
        self._run("rsync", "-aS", "--fsync", staged, f"backup:{self.place}/")


class StagedRestic(Staged):
    """`restic backup --force`, as OpenNebula calls it; also its `init`, as part of a first backup."""

    tool = "restic"

    def __init__(self, lab: Netlab, machine: Machine, directory: Path) -> None:
        super().__init__(lab, machine, directory)
        self._repository, self._exists = "", False
        self._password = directory / "password"
        self._password.write_text(_PASSWORD)

    def renew(self) -> None:
        """From now on `send` goes to a repository that has yet to be made."""
        self._repository = f"sftp:backup:{self.place}/{self._number}"
        self._exists = False

    def send(self, staged: Path) -> None:
        if not self._exists:
            self._restic("init")
            self._exists = True
        self._restic("backup", "--force", "--json", str(staged))

    def _restic(self, *words: str) -> None:
        self._run("restic", "-r", self._repository, "--password-file", self._password, *words)


class Pulled(Peer):
    """virtnbdbackup on the server, of a remote hypervisor."""

    label = "virtnbdbackup of a remote host"

    def __init__(self, lab: Netlab, machine: Machine, directory: Path) -> None:
        super().__init__(lab["backup"], f"/srv/{directory.name}")
        self._hypervisor, self._machine, self._number = lab["daemon"], machine, 0

    def renew(self) -> None:
        for checkpoint in self._machine.domain.listAllCheckpoints():
            checkpoint.delete()
        self._number += 1

    def backup(self, *, full: bool) -> None:
        place = f"{self.place}/{self._number}"
        argv = ["virtnbdbackup", "-U", f"qemu+ssh://root@{self._hypervisor.name}/system"]
        argv += ["--ssh-user", "root", "-I", self._hypervisor.address, "-d", self._machine.name]
        argv += ["-l", "full" if full else "inc", "-i", "vdb", "-n", "-o", place]
        self.server.run(argv, timeout_s=600)
        self.server.run(["find", place, "-type", "f", "-exec", "sync", "{}", "+"], timeout_s=600)


#: by the name of the rows: the store that ours goes to, and the other side
PEERS: dict[str, tuple[str, Callable[[Netlab, Machine, Path], Peer]]] = {
    "rsync": ("rsync", StagedRsync),
    "restic": ("restic", StagedRestic),
    "pulled": ("rsync", Pulled),
}
