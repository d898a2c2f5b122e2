"""Stores of OpenNebula's become datastores: imported, restored, checked, and kept as they are."""

from __future__ import annotations

import base64
import getpass
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from opennebula_store import IDS, UUID, VM_XML, OpenNebulaStore
from product import Product
from sshd import ALIAS, Sshd
from stores import Store, run


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


@pytest.mark.whole_matrix  # contract/restic has it with the driver alone
def test_a_repository_of_a_job_is_imported_and_restored(product: Product, sshd: Sshd, tmp_path: Path) -> None:
    """Two VMs in one repository of restic's, which OpenNebula names after the backup job."""
    base = tmp_path / "100"
    base.mkdir()
    password = tmp_path / "password"
    password.write_text("of the repository")
    restic = ("restic", "--no-cache", "--repo", base / "job_12", "--password-file", password)
    run(*restic, "init")
    truths = {}
    for vm_id in (7, 8):
        root = tmp_path / f"of-{vm_id}"
        root.mkdir()
        foreign = OpenNebulaStore(Store(root / "var/lib/one/datastores/0", root, Path(), vm_id=vm_id), root)
        foreign.add("backup", 0)
        folder = foreign.folder / "backup"
        (folder / "vm.xml").write_bytes(
            base64.encodebytes(VM_XML.replace("0b7d", f"000{vm_id}").replace("web", f"web{vm_id}").encode())
        )
        said = run(*restic, "backup", "--force", "--json", "--tag", f"one-{vm_id}", *sorted(folder.iterdir()))
        short = json.loads(said.splitlines()[-1])["snapshot_id"][:8]
        truths[f"web{vm_id} <1>"] = (short, f"{folder}/disk.0.0", foreign.expected[0])

    product.run(
        "datastore", "create", "jobs", "--driver", "restic", "--accept-host-key", sshd.fingerprint,
        f"BASE_PATH={base}", f"RESTIC_SFTP_SERVER={ALIAS}", f"RESTIC_SFTP_USER={getpass.getuser()}",
        f"RESTIC_PASSWORD=@{password}",
    )  # fmt: skip
    imported = product.ask("datastore", "import", "jobs")["result"]
    assert (imported["backups"], imported["images"], imported["vms"]) == (2, 2, 2)
    assert imported["unreadable"] == []
    names = {vm["id"]: vm["name"] for vm in product.ask("vm", "list")}
    images = product.ask("image", "list")
    assert sorted(names[image["vm_id"]] for image in images) == sorted(truths)
    for image in images:
        short, path, truth = truths[names[image["vm_id"]]]
        target = tmp_path / f"restored-{image['id']}"
        product.run("download", f"{image['id']}:0", str(target))
        assert (target / "disk.0.raw").read_bytes() == truth
        product.run("download", f"restic://{image['datastore_id']}/12/0:{short}{path}", f"{target}.raw")
        assert Path(f"{target}.raw").read_bytes() == truth

    # A wrong password does not take the place of the one that opens what is there.
    typo = tmp_path / "typo"
    typo.write_text("of the repositroy")
    refused = product.call("datastore", "update", "jobs", f"RESTIC_PASSWORD=@{typo}")
    assert refused.returncode == 77
    assert b"does not open" in refused.stderr
    product.run("image", "ls", str(images[0]["id"]))
