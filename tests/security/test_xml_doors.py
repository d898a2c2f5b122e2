"""XML bombs and external entities at every door through which XML comes in.

There is one parser (`xmldoc`), which refuses all of them; here each door is tried as it is
used: a hypervisor, a store, a driver's answer and a driver's input.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from opennebula_store import OpenNebulaStore
from stores import make_store

from oned_backup import xmldoc
from oned_backup.contract.documents import RestorePlan, StoredDisk
from oned_backup.errors import OnedBackupError
from oned_backup.hypervisor import domain as domains
from oned_backup.operations.inventory import import_vms
from oned_backup.sdk.folder_store import MARKER_TEXT
from oned_backup.store import OperationState
from tests.unit.operations.conftest import World, empty_database, world

__all__ = ["empty_database", "world"]

ROOT = Path(__file__).parents[2]
SECRET = "TOP-SECRET-OF-THE-HOST"  # noqa: S105 - made for this test
_ENTITIES = "".join(f'<!ENTITY {chr(98 + n)} "{f"&{chr(97 + n)};" * 10}">' for n in range(9))
ATTACKS = {
    "bomb": f'<!DOCTYPE ROOT [<!ENTITY a "aaaaaaaaaa">{_ENTITIES}]><ROOT><NAME>&j;</NAME></ROOT>',
    "outside": '<!DOCTYPE ROOT [<!ENTITY x SYSTEM "file://SECRET">]><ROOT><NAME>&x;</NAME></ROOT>',
    "parameter": '<!DOCTYPE ROOT [<!ENTITY % x SYSTEM "file://SECRET"> %x;]><ROOT/>',
    "deep": "<ROOT>" + "<a>" * 20_000 + "</a>" * 20_000 + "</ROOT>",
}


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """The attack as a document with that root; what it names is a file that may not be read."""
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    began = time.monotonic()
    yield lambda root: ATTACKS[request.param].replace("SECRET", str(secret)).replace("ROOT", root)
    assert time.monotonic() - began < 60


def test_nothing_else_parses_xml() -> None:
    parsers = re.compile(r"\b(lxml|etree|ElementTree|minidom|pulldom|expat|xml\.sax|xmltodict)\b")
    users = {
        str(path.relative_to(ROOT))
        for folder in ("oned_backup", "drivers")
        for path in (ROOT / folder).rglob("*.py")
        if parsers.search(path.read_text())
    }
    # The views turn documents that `xmldoc` has read into JSON.
    assert users == {"oned_backup/xmldoc.py", "oned_backup/model/views.py"}


@pytest.mark.fault("security", "XML bomb or external entity from a hypervisor, a store or a driver")
def test_the_domain_of_a_hypervisor(world: World, attack: Callable[[str], str]) -> None:
    """What `dump_xml` answers, when a VM is imported and when it is backed up."""
    world.drivers.answers["dump_xml"] = lambda _request: {"DOMAIN": attack("domain"), "STATE": "RUNNING"}
    ended = world.run("backup", vm_id=0)
    assert ended.state is OperationState.FAILED
    assert "driver output" in ended.error
    assert SECRET not in ended.error
    world.drivers.answers["monitor"] = lambda _request: {"DOMAINS": attack("DOMAINS")}
    with pytest.raises(OnedBackupError, match="driver output") as refused:
        import_vms(world.services, 0, [], every=True)
    assert SECRET not in str(refused.value)


@pytest.mark.fault("security", "XML bomb or external entity from a hypervisor, a store or a driver")
def test_libvirts_own_answer(attack: Callable[[str], str]) -> None:
    class Handle:
        def XMLDesc(self, _flags: int = 0) -> str:  # noqa: N802 - libvirt's name
            return attack("domain")

        def name(self) -> str:
            return "web"

        def UUIDString(self) -> str:  # noqa: N802 - libvirt's name
            return "9a1c2b3d-0000-4000-8000-000000000001"

    with pytest.raises(OnedBackupError) as refused:
        domains.Domain(Handle()).xml()
    assert SECRET not in str(refused.value)


@pytest.mark.fault("security", "XML bomb or external entity from a hypervisor, a store or a driver")
@pytest.mark.parametrize("key", ["EXPORTS", "PLAN", "CATALOGUE", "REPORT"])
def test_the_answers_of_drivers(world: World, attack: Callable[[str], str], key: str) -> None:
    world.run("backup", vm_id=0)
    action, kind = {
        "EXPORTS": ("pre_backup_live", "backup"),
        "PLAN": ("restore", "restore"),
        "CATALOGUE": ("catalogue", "import"),
        "REPORT": ("verify", "verify"),
    }[key]
    world.drivers.answers[action] = lambda _request: {key: attack(key)}
    arguments = {"backup": {"vm_id": 0}, "import": {"datastore_id": 100}}.get(kind, {"image_id": 0})
    if kind == "restore":
        arguments = {"image_id": 0, "to": str(world.services.settings.state_dir / "out")}
    ended = world.run(kind, **arguments)
    assert ended.state is OperationState.FAILED
    assert "not accepted" in ended.error or "not well-formed" in ended.error, ended.error
    assert SECRET not in ended.error


@pytest.mark.fault("security", "XML bomb or external entity from a hypervisor, a store or a driver")
def test_the_documents_in_a_store(world: World, attack: Callable[[str], str], tmp_path: Path) -> None:
    """`domain.xml` and `vm.xml` of a backup whose checksums are right."""
    world.run("backup", vm_id=0)
    disk = StoredDisk(0, "fs://100/-/0:x/0/disk.0", 1024, "disk.0.0")
    files = (("domain.xml", attack("domain").encode()), ("vm.xml", attack("VM").encode()))
    plan = xmldoc.serialize(RestorePlan("x", 0, (disk,), files).to_xml())
    world.drivers.answers["restore"] = lambda _request: {"PLAN": plan}
    ended = world.run("restore", image_id=0, to=str(tmp_path / "out"), define_host_id=0)
    assert ended.state is OperationState.FAILED
    assert SECRET not in ended.error
    assert "define" not in world.drivers.actions
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("security", "XML bomb or external entity from a hypervisor, a store or a driver")
def test_a_store_of_opennebulas(attack: Callable[[str], str], tmp_path: Path) -> None:
    """Its `vm.xml` is read when the catalogue is; one that is an attack hides no other backup."""
    root = tmp_path / "root"
    root.mkdir()
    foreign = OpenNebulaStore(make_store(root, ROOT / "drivers/datastore/fs"), root)
    foreign.add("a78156", 0)
    foreign.add("111111", 0)
    (foreign.folder / "a78156/vm.xml").write_bytes(base64.encodebytes(attack("VM").encode()))
    found = foreign.store.catalogue()
    assert any("111111" in text for text in found.manifests)
    assert SECRET not in str(found)


@pytest.mark.fault("security", "XML bomb or external entity from a hypervisor, a store or a driver")
@pytest.mark.parametrize("driver", ["datastore/fs", "tm/qcow2", "vmm/kvm"])
def test_the_input_of_a_driver(attack: Callable[[str], str], tmp_path: Path, driver: str) -> None:
    action = {"datastore/fs": "ls", "tm/qcow2": "pre_backup", "vmm/kvm": "dump_xml"}[driver]
    (tmp_path / "secrets").mkdir()
    (tmp_path / "7").mkdir()
    (tmp_path / ".oned-backup-store").write_bytes(MARKER_TEXT)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "ODB_SPEC": "1",
        "ODB_OPERATION_ID": "op-0123456789ab",
        "ODB_TRANSFER": "stream",
        "ODB_SECRETS_DIR": str(tmp_path / "secrets"),
        "ODB_DS_ID": "100",
        "ODB_DS_BASE_PATH": str(tmp_path),
        "ODB_VM_ID": "7",
    }
    done = subprocess.run(
        [str(ROOT / "drivers" / driver / action)],
        input=attack("REQUEST").encode(),
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode in {1, 2, 70}, said
    assert SECRET not in said
    assert "Traceback" not in said
