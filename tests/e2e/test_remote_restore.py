"""Restores from the daemon's machine to another hypervisor, and what is left there when they are ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab import LabError, wait_for
from netlab import Netlab
from product import Product

MIB = 1 << 20
DOMAIN = """<domain type='qemu'><name>{name}</name><memory>16384</memory>
  <os><type arch='x86_64' machine='pc'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>
    <nvram>{directory}/vars.fd</nvram></os>
  <features><acpi/></features><devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='{directory}/a.qcow2'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
      <source file='{directory}/b.qcow2'/><target dev='vdb' bus='virtio'/></disk>
  </devices></domain>"""


@dataclass
class Backups:
    """One image with two restore points of a domain on hv1 that is off."""

    product: Product
    netlab: Netlab
    #: the disks as they were at the newest point, as the daemon's user sees them
    disks: list[Path]

    @property
    def there(self) -> Path:
        """The root of the machine to restore to."""
        return self.netlab["hv2"].root

    def restore(self, *words: str) -> dict[str, Any]:
        self.product.run("image", "restore", "0", *words)
        return self.newest()

    def newest(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.product.ask(
            "operation", "show", self.product.ask("operation", "list")[0]["id"]
        )
        return shown

    def same(self, number: int, path: Path, fmt: str) -> None:
        argv = ["qemu-img", "compare", "-f", fmt, "-F", "qcow2", path, self.disks[number]]
        subprocess.run(argv, check=True, capture_output=True, timeout=60)

    def nothing_left(self) -> None:
        """Neither processes nor files, on the host and here."""
        left = ("qemu-nbd", ".ctl", "transfer.guard")
        for name in ("daemon", "hv2"):
            machine = self.netlab[name]
            lines = [" ".join(words) for words in machine.processes().values()]
            assert [line for line in lines if any(word in line for word in left)] == []
        assert list((self.there / "run/oned-backup").glob("*/*")) == []
        assert list((self.there / "srv").rglob(".oned-backup-*")) == []

    def wait_for_data(self) -> None:
        """Until the running restore has moved some."""

        def moving() -> bool:
            progress = self.newest()["progress"] or {}
            return progress.get("step") == "DOWNLOAD" and progress.get("done_bytes", 0) > MIB

        wait_for("data on its way", moving, 60)


@pytest.fixture(scope="module")
def backups(whole_netlab: Netlab) -> Iterator[Backups]:
    daemon, hv1, hv2 = (whole_netlab[name] for name in ("daemon", "hv1", "hv2"))
    directory = Path(tempfile.mkdtemp(prefix="r", dir=hv1.own))
    for name, size in (("a", 24), ("b", 12)):
        raw = directory / f"{name}.raw"
        raw.write_bytes(os.urandom(size * MIB))
        disk = directory / f"{name}.qcow2"
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, disk]
        subprocess.run(argv, check=True, timeout=60)
        subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", disk, "64M"], check=True, timeout=60)
        raw.unlink()
    (directory / "vars.fd").write_bytes(b"variables" * 1000)
    domain = hv1.libvirtd.connection.defineXML(DOMAIN.format(name="off", directory=directory))
    product = Product(Path(tempfile.mkdtemp(prefix="r", dir=daemon.own)), machine=daemon)
    product.start()
    store = daemon.own / "restore-store"
    store.mkdir()
    product.run("datastore", "create", "b", "--driver", "fs", f"BASE_PATH={store}")
    for machine in (hv1, hv2):
        hv2.libvirtd  # noqa: B018 - starts it
        uri = f"qemu+ssh://root@{machine.name}/system"
        words = ["--uri", uri, "--tm", "ssh", "--accept-host-key", machine.fingerprint]
        product.run("host", "add", machine.name, *words)
    product.run("vm", "import", "hv1", "off")
    product.run("vm", "backup", "0", "-d", "b")
    write = [
        "qemu-io",
        "-f",
        "qcow2",
        "-c",
        "write -z 1M 3M",
        "-c",
        "write -P 7 40M 1M",
        directory / "a.qcow2",
    ]
    subprocess.run(write, check=True, capture_output=True, timeout=60)
    product.run("vm", "backup", "0")
    yield Backups(product, whole_netlab, [directory / "a.qcow2", directory / "b.qcow2"])
    whole_netlab.calm()
    product.stop()
    domain.undefineFlags(4)  # VIR_DOMAIN_UNDEFINE_NVRAM
    shutil.rmtree(directory)
    shutil.rmtree(store)


@pytest.fixture(autouse=True)
def clean_network(backups: Backups) -> Iterator[None]:
    yield
    backups.netlab.calm()
    for path in (backups.there / "srv").iterdir():
        shutil.rmtree(path)


def test_a_vm_onto_another_host(backups: Backups) -> None:
    target = backups.there / "srv/vms/web"
    done = backups.restore("--define", "hv2", "--to", "/srv/vms/web", "--name", "again")
    assert done["result"]["deploy_id"] == "again"
    assert sorted(path.name for path in target.iterdir()) == [
        "disk.0.qcow2", "disk.1.qcow2", "domain.xml", "nvram.fd", "vm.xml",
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o600}
    for number in (0, 1):
        backups.same(number, target / f"disk.{number}.qcow2", "qcow2")
        subprocess.run(["qemu-img", "check", "-q", target / f"disk.{number}.qcow2"], check=True, timeout=60)
    assert (target / "disk.1.qcow2").stat().st_blocks * 512 < 14 * MIB
    assert (target / "nvram.fd").read_bytes() == b"variables" * 1000
    backups.nothing_left()
    domain = backups.netlab["hv2"].libvirtd.connection.lookupByName("again")
    assert "/srv/vms/web/disk.1.qcow2" in domain.XMLDesc()
    domain.undefineFlags(4)
    with pytest.raises(LabError, match="exists already"):
        backups.restore("--host", "hv2", "--to", "/srv/vms/web")
    backups.nothing_left()


def test_a_disk_and_a_whole_point_by_download(backups: Backups) -> None:
    url = backups.product.ask("image", "ls", "0")[0]["url"]
    (backups.there / "srv/d").mkdir()
    backups.product.run("download", url, "hv2:/srv/d/disk.raw")
    backups.same(0, backups.there / "srv/d/disk.raw", "raw")
    assert (backups.there / "srv/d/disk.raw").stat().st_blocks * 512 < 26 * MIB
    backups.product.run("download", "0", "hv2:/srv/point")
    backups.same(1, backups.there / "srv/point/disk.1.raw", "raw")
    backups.product.run("download", "0:0", str(backups.netlab["daemon"].own / "point"))
    here = backups.netlab["daemon"].own / "point"
    backups.same(1, here / "disk.1.raw", "raw")
    with pytest.raises(subprocess.CalledProcessError):
        backups.same(0, here / "disk.0.raw", "raw")  # the first point
    shutil.rmtree(here)
    backups.nothing_left()


def test_a_full_host_is_named_and_left_clean(backups: Backups) -> None:
    hv2 = backups.netlab["hv2"]
    hv2.run(["mkdir", "/srv/small"])
    hv2.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/srv/small"])
    try:
        words = ["--host", "hv2", "--to", "/srv/small/vm"]
        needed = r"exit 73\n.*hv2:/srv/small/vm: at least 3\d MB needed, \d MB free"
        with pytest.raises(LabError, match=needed):
            backups.restore(*words)
        assert backups.newest()["steps"][-1]["name"] == "REMOVE"
        assert "DOWNLOAD" not in {step["name"] for step in backups.newest()["steps"]}
        with pytest.raises(LabError, match=r"exit 73\n.*hv2:/srv/small/vm: no space left"):
            backups.restore(*words, "--no-space-check")
        backups.nothing_left()
        assert hv2.run(["ls", "-A", "/srv/small"]).stdout == b""
    finally:
        hv2.run(["umount", "/srv/small"])


def _begin(backups: Backups) -> str:
    """A restore that moves data slowly."""
    backups.netlab["hv2"].rate("24mbit")
    words = ["image", "restore", "0", "--host", "hv2", "--to", "/srv/a/b", "--no-wait"]
    operation = backups.product.run(*words).strip()
    backups.wait_for_data()
    return operation


def _ended(backups: Backups, operation: str) -> dict[str, Any]:
    backups.netlab.calm()

    def ended() -> dict[str, Any] | None:
        view: dict[str, Any] = backups.product.ask("operation", "show", operation)
        return view if view["ended_at"] else None

    view: dict[str, Any] = wait_for("end of the restore", ended, 90)
    return view


def test_a_cancelled_one_leaves_nothing(backups: Backups) -> None:
    operation = _begin(backups)
    backups.product.run("operation", "cancel", operation)
    assert _ended(backups, operation)["state"] == "CANCELLED"
    backups.nothing_left()
    assert list((backups.there / "srv").iterdir()) == []


def test_a_killed_daemon_leaves_nothing(backups: Backups) -> None:
    operation = _begin(backups)
    backups.product.kill()
    backups.netlab.calm()
    backups.product.start()
    assert _ended(backups, operation)["state"] == "FAILED"
    backups.nothing_left()
    assert list((backups.there / "srv").iterdir()) == []


def _gone_by_itself(backups: Backups) -> None:
    """When nobody has been there for too long, the host ends its servers and removes what is unfinished."""
    hv2 = backups.netlab["hv2"]
    assert hv2.processes("qemu-nbd")
    (alive,) = (backups.there / "run/oned-backup").glob("*/*/alive")
    os.utime(alive, (0, 0))
    wait_for("end of the servers", lambda: not hv2.processes("qemu-nbd"), 30)
    wait_for("end of their files", lambda: not list((backups.there / "srv").rglob(".oned-backup-*")), 30)


def test_the_host_cleans_up_if_the_daemon_stays_dead(backups: Backups) -> None:
    operation = _begin(backups)
    backups.product.kill()
    watchmen = backups.netlab["daemon"].processes
    wait_for("end of the watchman", lambda: not watchmen("transfer.guard"), 30)
    _gone_by_itself(backups)
    backups.netlab.calm()
    backups.product.start()
    assert _ended(backups, operation)["state"] == "FAILED"
    backups.nothing_left()
    assert list((backups.there / "srv").iterdir()) == []


@pytest.mark.whole_matrix
def test_a_cable_that_is_pulled_and_put_back(backups: Backups) -> None:
    operation = _begin(backups)
    backups.netlab["hv2"].link(up=False)

    def noticed() -> bool:
        step = (backups.product.ask("operation", "show", operation)["progress"] or {}).get("step")
        return step in {"REMOVE", "WAIT"}

    _gone_by_itself(backups)
    wait_for("the cable to be missed", noticed, 60)
    view = _ended(backups, operation)
    assert view["state"] == "DONE"
    backups.same(0, backups.there / "srv/a/b/disk.0.qcow2", "qcow2")
    backups.nothing_left()
