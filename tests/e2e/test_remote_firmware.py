"""A VM with firmware and a TPM, from the stores on a server to another hypervisor, where it is started."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Guest, data_disk
from netlab import Machine, Netlab
from product import Product
from remote_site import STORES, Site

pytestmark = pytest.mark.guest


@pytest.fixture
def site(netlab: Netlab, remote_product: Product) -> Iterator[Site]:
    site = Site(netlab, remote_product)
    yield site
    netlab.calm()
    site.close()


@pytest.fixture
def guest(netlab: Netlab) -> Iterator[Guest]:
    """A guest on hv1 that has run, so that its firmware and its TPM have something to remember."""
    directory = Path(tempfile.mkdtemp(prefix="g", dir=netlab["hv1"].own))
    disks = [data_disk(directory, 16)]
    libvirtd = netlab["hv1"].libvirtd
    guest = Guest(libvirtd, directory, "secure", disks, boot="disk", agent=False, uefi=True, tpm=True)
    guest.start()
    guest.end()
    yield guest
    guest.destroy()
    shutil.rmtree(directory)


def tpm_state(machine: Machine, uuid: str) -> bytes:
    return (machine.root / f"var/lib/libvirt/swtpm/{uuid}/tpm2/tpm2-00.permall").read_bytes()


@pytest.mark.whole_matrix
def test_from_rsync_and_restic_to_another_host(netlab: Netlab, site: Site, guest: Guest) -> None:
    hv1, hv2 = netlab["hv1"], netlab["hv2"]
    product = site.product
    for machine in (hv1, hv2):
        machine.libvirtd.connection.getHostname()  # starts it
        uri = f"qemu+ssh://root@{machine.name}/system"
        words = ["--uri", uri, "--tm", "ssh", "--accept-host-key", machine.fingerprint]
        product.run("host", "add", machine.name, *words)
    product.run("vm", "import", "hv1", guest.name)
    product.run("vm", "set", "0", "MODE=INCREMENT")
    (disk,) = guest.disks
    assert guest.nvram is not None
    for image, store in enumerate(STORES):
        site.add_store(store)
        product.run("vm", "backup", "0", "-d", store)
        write = ["qemu-io", "-f", "qcow2", "-c", f"write -P {image + 1} 8M 1M", disk.path]
        subprocess.run(write, check=True, capture_output=True, timeout=60)
        product.run("vm", "backup", "0")

        target = f"/srv/{store}-vm"
        product.run("image", "restore", str(image), "--define", "hv2", "--to", target, "--name", store)
        there = hv2.root / target.lstrip("/")
        same = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", there / "disk.0.qcow2", disk.path]
        subprocess.run(same, check=True, capture_output=True, timeout=60)
        assert (there / "nvram.fd").read_bytes() == guest.nvram.read_bytes()
        restored = Guest.adopt(hv2.libvirtd, store)
        try:
            assert tpm_state(hv2, restored.uuid) == tpm_state(hv1, guest.uuid)
            restored.start()
            assert restored.is_active()
            assert hv2.processes("swtpm", restored.uuid)
        finally:
            restored.destroy()
            hv2.run(["rm", "-rf", target])
