"""`vm untrack` on a real guest: what our bitmaps were in the way of works again, as does the next backup."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest
from backed_up_vm import command
from lab import Guest, data_disk, root_disk
from product import Product

SNAPSHOT = "<domainsnapshot><name>before</name></domainsnapshot>"


@pytest.mark.guest
def test_it_runs_and_it_is_off(make_guest: Callable[..., Guest], product: Product, tmp_path: Path) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64)], name="web")
    (tmp_path / "store").mkdir()
    product.run("host", "add", "local", "--uri", guest.libvirtd.uri)
    product.run("vm", "import", "local", "web")
    product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={tmp_path / 'store'}")
    product.run("vm", "backup", "web")
    snapshot = guest.domain.snapshotCreateXML(SNAPSHOT, 0)
    with pytest.raises(libvirt.libvirtError, match="Device has active dirty bitmaps"):
        guest.domain.revertToSnapshot(snapshot, 0)
    guest.start()

    said = product.run("vm", "untrack", "web")
    assert "the next backup is a full one" in said
    assert not guest.domain.listAllCheckpoints()
    guest.domain.revertToSnapshot(snapshot, 0)
    snapshot.delete(0)
    assert types(product) == ["FULL", "FULL"]

    guest.end()
    product.run("vm", "untrack", "web")
    assert not guest.domain.listAllCheckpoints()
    assert [bitmaps(disk.path) for disk in guest.disks] == [[], []]
    product.run("vm", "untrack", "web")
    assert types(product) == ["FULL", "FULL"]
    assert {disk["reason"] for disk in newest(product)} == {"chain-ended"}


def newest(product: Product) -> list[dict[str, str]]:
    """The disks of the newest backup."""
    image = product.ask("image", "list")[-1]["id"]
    disks: list[dict[str, str]] = product.ask("image", "show", str(image))["increments"][-1]["disks"]
    return disks


def types(product: Product) -> list[str]:
    """Back up the VM; as what each disk was stored."""
    product.run("vm", "backup", "web")
    return [disk["type"] for disk in newest(product)]


def bitmaps(image: Path) -> list[str]:
    """The names of an image's dirty bitmaps."""
    found = json.loads(command("qemu-img", "info", "--output=json", str(image)))
    data = found.get("format-specific", {}).get("data", {})
    return [bitmap["name"] for bitmap in data.get("bitmaps", ())]
