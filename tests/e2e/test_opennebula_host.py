"""A hypervisor as OpenNebula has them, and its VMs.

QEMU runs as a user to whom libvirt gives no files (dynamic_ownership=0), and a domain is gone when it is off.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import libvirt
import pytest
from lab import Guest, Libvirtd, data_disk
from product import Product

USER = "libvirt-qemu"


@pytest.fixture
def one_13(short_dir: Path) -> Iterator[Guest]:
    """A domain that runs and is not defined, with a disk that belongs to its QEMU."""
    datastore = short_dir / "13"
    datastore.mkdir()
    with Libvirtd(qemu_user=USER, dynamic_ownership=False) as server:
        disk = data_disk(datastore, 16)
        for path in (datastore, disk.path):
            shutil.chown(path, USER)
        guest = Guest(server, datastore, "one-13", [disk], boot="disk", agent=False)
        guest.start()
        guest.domain.undefine()
        yield guest


@pytest.mark.fault("host", "QEMU under another user")
def test_increments_go_on_when_a_domain_is_made_anew(one_13: Guest, product: Product, tmp_path: Path) -> None:
    definition = one_13.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    assert not one_13.domain.isPersistent()
    assert Path(f"/proc/{one_13.pid}").stat().st_uid != 0
    (tmp_path / "store").mkdir()
    product.run("host", "add", "local", "--uri", one_13.libvirtd.uri)
    product.run("vm", "import", "local", "one-13")
    product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={tmp_path / 'store'}")
    product.run("vm", "backup", "one-13")
    product.run("vm", "backup", "one-13")

    one_13.domain.destroy()
    assert product.call("vm", "backup", "one-13").returncode == 66, "libvirt has no such domain"
    one_13.libvirtd.connection.createXML(definition)
    product.run("vm", "backup", "one-13")

    (image,) = product.ask("image", "list")
    points = product.ask("image", "show", str(image["id"]))["increments"]
    assert [point["type"] for point in points] == ["FULL", "INCREMENT", "INCREMENT"]
    assert [path.name for path in one_13.disks[0].path.parent.glob(".oned-backup-*")] == []
