"""A domain that is gone when it is off, as OpenNebula makes them, keeps its chain when it is made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest
from lab import Guest, data_disk, root_disk
from product import Product

FORGET = libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA


@pytest.mark.guest
def test_its_increments_go_on(make_guest: Callable[..., Guest], product: Product, tmp_path: Path) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64)], name="one-13")
    guest.domain.undefineFlags(FORGET)
    definition = guest.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    assert not guest.domain.isPersistent()
    (tmp_path / "store").mkdir()
    product.run("host", "add", "local", "--uri", guest.libvirtd.uri)
    product.run("vm", "import", "local", "one-13")
    product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={tmp_path / 'store'}")
    product.run("vm", "backup", "one-13")
    product.run("vm", "backup", "one-13")

    guest.domain.destroy()
    assert product.call("vm", "backup", "one-13").returncode == 66, "libvirt has no such domain"
    guest.libvirtd.connection.createXML(definition)
    guest.wait_ready()
    product.run("vm", "backup", "one-13")

    (image,) = product.ask("image", "list")
    points = product.ask("image", "show", str(image["id"]))["increments"]
    assert [point["type"] for point in points] == ["FULL", "INCREMENT", "INCREMENT"]
    assert {disk["type"] for disk in points[-1]["disks"]} == {"INCREMENT"}
    guest.libvirtd.connection.defineXML(definition)  # for the fixture that removes it
