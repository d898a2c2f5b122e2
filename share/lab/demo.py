"""`make demo`: the main job on a real guest, told step by step.

Builds a tiny guest, boots it under a private libvirtd, backs it up in full while
it runs, in an increment while it runs, and in another while it is off; restores
every increment, boots the last one as a new VM, and looks at the files inside.
Every claim it prints was compared a moment before; the first comparison that
does not hold ends it with exit code 1. Nothing is left behind.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import Guest, LabError, Libvirtd, cdrom, data_disk, root_disk, wait_for
from product import Product
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PREFIX = "odb-demo-"
console = Console(highlight=False, soft_wrap=True)


class DemoError(RuntimeError):
    """Something did not hold."""


def say(text: str) -> None:
    """A line of the story."""
    console.print(text)


def check(what: str, holds: object) -> None:
    """Print a comparison that held; end the demo at one that did not."""
    if not holds:
        raise DemoError(f"this does not hold: {what}")
    console.print(f"   [green]✓[/] {what}")


class Shown(Product):
    """The product, whose commands are part of the story."""

    def show(self, *words: str) -> str:
        """Show a command, run it, and return what it prints."""
        console.print(f"   [bold]$ oned-backup {' '.join(words)}[/]")
        return self.run(*words, timeout_s=600)


@contextmanager
def workplace() -> Iterator[Path]:
    """A fresh directory; directories that killed demos left are removed first."""
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        owner = old / "pid"
        pid = int(owner.read_text()) if owner.exists() else 0
        if not (pid and Path(f"/proc/{pid}").exists()):
            _end_left_daemon(old)
            shutil.rmtree(old, ignore_errors=True)
    directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    directory.chmod(0o755)
    (directory / "pid").write_text(str(os.getpid()))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _end_left_daemon(directory: Path) -> None:
    """End the daemon of a killed demo: the process that was started with that directory's settings."""
    wanted = os.fsencode(directory / "config.toml")
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in words and b"serve" in words:
            os.kill(int(entry.name), signal.SIGTERM)
            wait_for("end of an old daemon", lambda entry=entry: not entry.exists(), 30)


def content(number: int) -> bytes:
    """What the demo writes into the guest for the backup of that number."""
    return b"".join(hashlib.sha256(f"{number}.{block}".encode()).digest() for block in range(512))


def file_in(disk: Path, name: str) -> bytes:
    """A file of the ext4 file system on a raw disk; empty if it is not there."""
    done = subprocess.run(
        ["debugfs", "-R", f"cat /{name}", disk], check=False, stdin=subprocess.DEVNULL, capture_output=True
    )
    return done.stdout


def identical(one: Path, one_format: str, other: Path, other_format: str) -> bool:
    """Whether QEMU finds two disks equal."""
    argv = ["qemu-img", "compare", "-U", "-f", one_format, "-F", other_format, "--", one, other]
    return subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def backed_up(product: Shown, *words: str) -> dict[str, Any]:
    """Back up VM 0 and return what the operation did."""
    product.show("vm", "backup", "0", *words)
    operation = product.ask("operation", "list")[0]
    shown: dict[str, Any] = product.ask("operation", "show", operation["id"])
    if shown["state"] != "DONE":
        raise DemoError(f"backup ended {shown['state']}: {shown['error']}")
    return shown


def tell(operation: dict[str, Any], table: Table, name: str) -> None:
    """A row of the closing table."""
    result = operation["result"]
    seconds = operation["ended_at"] - operation["started_at"]
    freeze = result["freeze"]
    disks = ", ".join(f"{disk['target']} {disk['type']} ({disk['reason']})" for disk in result["disks"])
    table.add_row(
        name,
        f"{seconds:.1f} s",
        f"{result['size_mb']} MB",
        f"{freeze['method']} {freeze['window_ms']} ms",
        disks,
    )


def demonstrate(directory: Path, libvirtd: Libvirtd) -> None:
    """The story."""
    disks = directory / "vm"
    disks.mkdir()
    say("[bold]1. A guest.[/] two qcow2 disks, a CD-ROM drive, the guest agent; no KVM needed.")
    web = [root_disk(disks), data_disk(disks, 256), cdrom()]
    guest = Guest(libvirtd, disks, "web", web)
    started = time.monotonic()
    guest.start()
    guest.wait_ready()
    say(f"   booted in {time.monotonic() - started:.0f} s under software emulation")

    say("[bold]2. oned-backup[/] learns of the hypervisor, the VM and a place for backups.")
    product = Shown(directory)
    try:
        product.start()
        _back_up_and_restore(product, directory, libvirtd, guest)
    finally:
        product.stop()
        guest.destroy()


def _back_up_and_restore(product: Shown, directory: Path, libvirtd: Libvirtd, guest: Guest) -> None:
    store = directory / "backup"
    store.mkdir()
    product.show("host", "add", "local", "--uri", libvirtd.uri)
    product.show("vm", "import", "local", "web")
    product.show("vm", "set", "0", "FS_FREEZE=AGENT", "MODE=INCREMENT")
    product.show("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={store}")
    costs = Table(title="What the backups cost")
    for column in ("backup", "time", "stored", "freeze", "disks"):
        costs.add_column(column)

    say("[bold]3. A full backup while the guest runs,[/] its file systems frozen by its agent.")
    guest.write_file("/data/vdb/zero", content(0))
    full = backed_up(product, "-d", "nightly")
    tell(full, costs, "0 running")
    check("all disks are FULL", all(disk["type"] == "FULL" for disk in full["result"]["disks"]))
    check("the agent froze the guest", full["result"]["freeze"]["method"] == "AGENT")
    check(
        "the guest writes again",
        guest.shell("echo thawed >/data/vdb/thawed; cat /data/vdb/thawed") == "thawed",
    )
    excluded = full["result"]["excluded"]
    check(f"left out, with the reason: {excluded[0]['target']} ({excluded[0]['reason']})", len(excluded) == 1)

    say("[bold]4. Files change in the guest; an increment while it runs.[/]")
    guest.write_file("/data/vdb/one", content(1))
    guest.shell("rm /data/vdb/zero; sync; fstrim /data/vdb 2>/dev/null || true")
    live = backed_up(product)
    tell(live, costs, "1 running")
    check("all disks are INCREMENT", all(disk["type"] == "INCREMENT" for disk in live["result"]["disks"]))

    say("[bold]5. QEMU is stopped; another increment while the VM is off.[/]")
    guest.write_file("/data/vdb/two", content(2))
    guest.stop()
    off = backed_up(product)
    tell(off, costs, "2 off")
    check("all disks are INCREMENT", all(disk["type"] == "INCREMENT" for disk in off["result"]["disks"]))

    say("[bold]6. What is stored,[/] and that it is what was written.")
    console.print(product.show("image", "show", "0"), end="", markup=False)
    product.show("image", "verify", "0")
    points = product.ask("image", "show", "0")["increments"]
    check(
        "every restore point is verified", len(points) == 3 and all(point["verified_at"] for point in points)
    )

    say("[bold]7. Every increment is restored,[/] each as a new VM.")
    for number in range(3):
        target = directory / "restored" / str(number)
        product.show(
            "image", "restore", "0", "--increment", str(number), "--format", "raw", "--to", str(target),
            "--define", "local", "--name", f"web-{number}",
        )  # fmt: skip
        _check_files(target, number)
    last = directory / "restored" / "2"
    check(
        "root disk of increment 2 = the VM's own, says qemu-img",
        identical(_disk(last, 0), "raw", guest.disks[0].path, "qcow2"),
    )
    check(
        "data disk of increment 2 = the VM's own, says qemu-img",
        identical(_disk(last, 1), "raw", guest.disks[1].path, "qcow2"),
    )

    say("[bold]8. The last one boots,[/] and its files are there.")
    _boot(libvirtd, "web-2")
    console.print()
    console.print(costs)


def _disk(target: Path, disk_id: int) -> Path:
    """The restored file of a disk."""
    found = sorted(target.glob(f"disk.{disk_id}*.raw")) or sorted(target.glob(f"disk.{disk_id}*"))
    if len(found) != 1:
        raise DemoError(f"{target} has {[path.name for path in target.iterdir()]}, no single disk {disk_id}")
    return found[0]


def _check_files(target: Path, number: int) -> None:
    disk = _disk(target, 1)
    present = {"zero": number == 0, "one": number >= 1, "two": number >= 2}
    for index, (name, expected) in enumerate(present.items()):
        found = file_in(disk, name)
        if expected:
            check(f"increment {number} has the file '{name}', byte for byte", found == content(index))
        else:
            check(f"increment {number} has no file '{name}'", not found)


def _boot(libvirtd: Libvirtd, name: str) -> None:
    twin = Guest.adopt(libvirtd, name)
    started = time.monotonic()
    twin.start()
    twin.wait_ready()
    say(f"   {name} booted in {time.monotonic() - started:.0f} s")
    for number, file in ((1, "one"), (2, "two")):
        check(
            f"the restored VM reads '{file}', byte for byte",
            twin.read_file(f"/data/vdb/{file}") == content(number),
        )
    twin.stop()


def main() -> int:
    """Run the demo; the exit code."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with workplace() as directory, Libvirtd() as libvirtd:
            demonstrate(directory, libvirtd)
    except (DemoError, LabError) as error:
        console.print(f"[red]✗[/] {escape(str(error))}")
        return 1
    console.print(
        f"[green]All of it held.[/] It took {time.monotonic() - started:.0f} s; nothing is left behind."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
