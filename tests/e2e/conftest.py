"""Real libvirt and real guests for the tests in this folder; see share/lab/lab.py."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from backed_up_vm import BackedUpVm
from lab import Guest, LabDisk, Libvirtd, root_disk
from netlab import Netlab
from product import Product


@pytest.fixture(scope="session")
def libvirtd() -> Iterator[Libvirtd]:
    """A private libvirtd for the whole run."""
    with Libvirtd() as server:
        yield server


@pytest.fixture
def make_guest(libvirtd: Libvirtd, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Make a guest with a fresh disk of its own (or the given ones); all are destroyed afterwards."""
    guests: list[Guest] = []

    def make(
        disks: Sequence[LabDisk] | None = None, *, start: bool = True, name: str = "", **options: object
    ) -> Guest:
        name = name or f"guest{len(guests)}-{tmp_path.name[:30]}"
        guest = Guest(libvirtd, tmp_path, name, disks or [root_disk(tmp_path)], **options)  # type: ignore[arg-type]
        guests.append(guest)
        if start:
            guest.start()
            guest.wait_ready()
        return guest

    yield make
    for guest in guests:
        guest.destroy()


@pytest.fixture
def guest(make_guest: Callable[..., Guest]) -> Guest:
    """A running guest with one disk, its agent answering."""
    return make_guest()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory with a path short enough for unix sockets."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def product(short_dir: Path) -> Iterator[Product]:
    """The command with a running daemon of its own."""
    product = Product(short_dir)
    product.start()
    yield product
    product.stop()


@pytest.fixture
def back_up(tmp_path: Path, short_dir: Path) -> Callable[[Guest], BackedUpVm]:
    """Make a guest known as a VM that is backed up."""

    def know(guest: Guest) -> BackedUpVm:
        return BackedUpVm(guest, tmp_path, short_dir / "s")

    return know


@pytest.fixture(scope="session")
def whole_netlab() -> Iterator[Netlab]:
    """The machines of the whole run; tests take `netlab`."""
    with Netlab(["daemon", "hv1", "hv2", "backup"]) as lab:
        yield lab


@pytest.fixture
def netlab(whole_netlab: Netlab) -> Iterator[Netlab]:
    """Machines that stand for the daemon's, two hypervisors and a backup server, with a network in order."""
    yield whole_netlab
    whole_netlab.calm()


@pytest.fixture
def remote_product(netlab: Netlab) -> Iterator[Product]:
    """The command with a daemon of its own, both in the machine `daemon`."""
    directory = Path(tempfile.mkdtemp(prefix="p", dir=netlab["daemon"].own))
    product = Product(directory, machine=netlab["daemon"])
    product.start()
    yield product
    product.stop()
