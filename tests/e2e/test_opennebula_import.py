"""An rsync store of OpenNebula's becomes a datastore: imported, restored, checked, and kept as it is."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from pathlib import Path

import pytest
from opennebula_store import IDS, UUID, OpenNebulaStore
from product import Product
from sshd import ALIAS, Sshd
from stores import Store


@pytest.fixture
def sshd(short_dir: Path) -> Iterator[Sshd]:
    with Sshd(short_dir / "sshd") as server:
        yield server


@pytest.fixture
def product(short_dir: Path, sshd: Sshd) -> Iterator[Product]:
    product = Product(short_dir)
    product.start(
        {
            "ODB_SSH__INCLUDE": str(sshd.directory / "hosts"),
            "ODB_SSH__IDENTITY_FILE": str(sshd.directory / "id"),
        }
    )
    yield product
    product.stop()


def test_a_store_of_opennebulas_is_imported_and_restored(
    product: Product, sshd: Sshd, tmp_path: Path
) -> None:
    (tmp_path / "100").mkdir()
    foreign = OpenNebulaStore(Store(tmp_path / "100", tmp_path, Path()), tmp_path)
    foreign.add(IDS[0], 0)
    foreign.add(IDS[1], 1, "write -P 3 512k 128k", "write -z 6M 64k")
    foreign.add("111111", 0)
    before = {path: path.read_bytes() for path in foreign.folder.rglob("*") if path.is_file()}

    account = (f"RSYNC_HOST={ALIAS}", f"RSYNC_USER={getpass.getuser()}", "RSYNC_ARGS=-aS")
    product.run(
        "datastore", "create", "old", "--driver", "rsync", "--accept-host-key", sshd.fingerprint,
        f"BASE_PATH={tmp_path}/100", *account,
    )  # fmt: skip
    imported = product.ask("datastore", "import", "old")["result"]
    assert (imported["backups"], imported["images"], imported["vms"]) == (3, 2, 1)
    assert imported["unreadable"] == []
    again = product.ask("datastore", "import", "old")["result"]
    assert (again["backups"], again["known"]) == (0, 3)

    vm = product.ask("vm", "show", "0")
    assert (vm["name"], vm["uuid"]) == ("web <1>", UUID)
    images = {image["id"]: image for image in product.ask("image", "list")}
    truths = {(0, 0): foreign.expected[0], (0, 1): foreign.expected[1], (1, 0): foreign.expected[2]}
    assert set(images) == {0, 1}
    for (image, increment), truth in truths.items():
        target = tmp_path / f"restored-{image}-{increment}"
        product.run("download", f"{image}:{increment}", str(target))
        assert (target / "disk.0.raw").read_bytes() == truth
        assert (target / "vm.xml").read_text().startswith("<VM>")
    product.run("image", "verify", "0")
    assert {path: path.read_bytes() for path in foreign.folder.rglob("*") if path.is_file()} == before
