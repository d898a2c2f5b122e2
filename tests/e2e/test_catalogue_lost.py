"""The machine of the daemon is lost, the store is not: the catalogue comes back out of it.

The VM is off all the time, so nothing has to boot. What it writes is written by
qemu-io, which keeps the dirty bitmaps of the disk as QEMU itself does.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from backed_up_vm import command
from lab import Guest, LabDisk
from product import Product


@pytest.mark.fault("daemon", "catalogue lost")
def test_the_catalogue_is_rebuilt_from_the_store(
    make_guest: Callable[..., Guest], product: Product, tmp_path: Path
) -> None:
    disk = LabDisk(tmp_path / "disk.qcow2")
    command("qemu-img", "create", "-q", "-f", "qcow2", str(disk.path), "64M")
    guest = make_guest([disk], start=False, name="web")
    store = tmp_path / "store"
    store.mkdir()
    set_up(product, guest, store)
    product.run("vm", "import", "local", "web")
    for number in range(3):
        write(disk, number)
        shutil.copy(disk.path, tmp_path / f"truth-{number}.qcow2")
        product.run("vm", "backup", "0")
    before = product.ask("image", "show", "0")
    assert [point["type"] for point in before["increments"]] == ["FULL", "INCREMENT", "INCREMENT"]
    product.stop()
    shutil.rmtree(product.state_dir)

    product.start()
    set_up(product, guest, store)
    assert product.ask("image", "list") == []
    first = product.ask("datastore", "import", "nightly")["result"]
    assert (first["backups"], first["images"], first["vms"], first["known"]) == (3, 1, 1, 0)
    again = product.ask("datastore", "import", "nightly")["result"]
    assert (again["backups"], again["images"], again["vms"], again["known"]) == (0, 0, 0, 3)
    assert again["unreadable"] == []

    (image,) = product.ask("image", "list")
    after = product.ask("image", "show", str(image["id"]))
    kept = ("increment_id", "type", "date", "size_mb", "disks")
    assert [{name: point[name] for name in kept} for point in after["increments"]] == [
        {name: point[name] for name in kept} for point in before["increments"]
    ]
    assert_restores(product, image["id"], 1, tmp_path / "truth-1.qcow2", tmp_path / "old")
    product.run("image", "verify", str(image["id"]))

    the_next_backup_begins_a_new_chain(product, image["id"], disk, tmp_path)


def the_next_backup_begins_a_new_chain(
    product: Product, image_id: int, disk: LabDisk, directory: Path
) -> None:
    """The checkpoint belongs to the installation that is lost: nobody vouches for its bitmap any more."""
    (vm,) = product.ask("vm", "import", "local", "web")
    assert vm["result"] == "adopted"
    write(disk, 3)
    full = product.ask("vm", "backup", str(vm["id"]))["result"]
    assert full["type"] == "FULL"
    assert [entry["reason"] for entry in full["disks"]] == ["chain-ended"]
    assert full["notes"] == ["new chain (chain-ended): the last one was ended"]
    assert full["image_id"] != image_id
    write(disk, 4)
    increment = product.ask("vm", "backup", str(vm["id"]))["result"]
    assert (increment["type"], increment["image_id"]) == ("INCREMENT", full["image_id"])
    assert_restores(product, full["image_id"], 1, disk.path, directory / "new")
    assert_restores(product, image_id, 2, directory / "truth-2.qcow2", directory / "newest-old")


def set_up(product: Product, guest: Guest, store: Path) -> None:
    product.run("host", "add", "local", "--uri", guest.uri)
    product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={store}")


def write(disk: LabDisk, number: int) -> None:
    """Change the disk of a VM that is off: something new, and something over the last."""
    command(
        "qemu-io", "-f", "qcow2", str(disk.path),
        "-c", f"write -q -P {number + 1} {number}M 512k",
        "-c", f"write -q -P {number + 101} 40M 192k",
    )  # fmt: skip


def assert_restores(product: Product, image_id: int, increment: int, truth: Path, target: Path) -> None:
    product.run("image", "restore", str(image_id), "--increment", str(increment), "--to", str(target))
    said = command(
        "qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(target / "disk.0.qcow2"), str(truth)
    )
    assert said == "Images are identical.\n"
