"""The dummy hypervisor: a backup and its restore without libvirt, QEMU or NBD."""

from __future__ import annotations

from pathlib import Path

import pytest

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.exports import Exports
from oned_backup.contract.request import Backup, Outcome, Request
from oned_backup.contract.targets import targets_from_xml
from oned_backup.disk.chain import Layer
from oned_backup.disk.restore import restore_chain
from oned_backup.errors import Busy, Conflict, NotFound, Unavailable
from oned_backup.hypervisor.dummy import DummyDomain, DummyHost
from oned_backup.model.backup_config import BackupConfig, FsFreeze
from oned_backup.model.host import new_host
from oned_backup.model.vm import DomainState, Vm, new_vm
from oned_backup.runner.drivers import find_driver
from oned_backup.runner.run import Invocation, Limits, run_action

DRIVERS = Path(__file__).parents[2] / "drivers"
MIB = 1 << 20


class Lab:
    """One dummy host, and its drivers run as the daemon runs them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = new_host(0, name="sim", uri=f"dummy://{directory}/host", vm_mad="dummy", tm_mad="dummy")
        self.hypervisor = DummyHost(self.host.uri)
        (directory / "files").mkdir()

    def vmm(self, action: str, **options: str) -> dict[str, str]:
        request = Request(Kind.VMM, "op-0123456789ab", action, host=self.host.element, options=options)
        return self._run(Kind.VMM, action, request)

    def tm(
        self, action: str, vm: Vm | None, *, outcome: Outcome | None = None, **options: str
    ) -> dict[str, str]:
        request = Request(
            Kind.TM,
            "op-0123456789ab",
            "backup",
            outcome=outcome,
            backup=Backup("b1", "b1", 0, 0),
            host=self.host.element,
            vm=vm.element if vm else None,
            options=options,
        )
        return self._run(Kind.TM, action, request)

    def document(self, domain: DummyDomain) -> Vm:
        answer = self.vmm("dump_xml", DOMAIN=domain.uuid)
        sizes = dict(item.split(":") for item in answer["CAPACITY"].split(","))
        return new_vm(
            1,
            name=domain.name,
            placement=self.host.placement,
            domain=xmldoc.parse(answer["DOMAIN"]),
            state=DomainState(answer["STATE"]),
            capacity_bytes={target: int(size) for target, size in sizes.items()},
            date=0,
            config=BackupConfig(fs_freeze=FsFreeze.AGENT),
        )

    def _run(self, kind: Kind, action: str, request: Request) -> dict[str, str]:
        driver = find_driver([DRIVERS], kind, "dummy")
        invocation = Invocation(self.directory, source_dir=self.directory / "files", transfer="staged")
        return run_action(driver, action, request, invocation, limits=Limits(deadline_s=60))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_staged_disks_restore_to_what_they_were(lab: Lab, tmp_path: Path) -> None:
    domain = lab.hypervisor.create("sim-1", {"vda": 10 * MIB + 1000, "vdb": 0})
    source = Path(domain.disks[0].source)
    with source.open("r+b") as file:
        file.seek(3 * MIB + 5)
        file.write(b"data" * 50_000)
        file.seek(10 * MIB + 990)
        file.write(b"at the end")
    exports = Exports.from_xml(
        xmldoc.parse(lab.tm("pre_backup_live", lab.document(domain), FULL_REASON="reset")["EXPORTS"])
    )
    assert [disk.reason.value for disk in exports.disks] == ["reset", "reset"]
    assert exports.freeze.method == "AGENT"
    for disk in exports.disks:
        path = Path(disk.path)
        assert path.stat().st_size < 2 * MIB
        target = tmp_path / f"restored-{disk.target}"
        restore_chain([Layer(path, Path(f"{path}.blocks"), disk.file)], target, format="raw")
        assert target.read_bytes() == Path(disk.source).read_bytes()
    lab.tm("post_backup_live", lab.document(domain), outcome=Outcome.SUCCESS)
    assert not lab.hypervisor.find(domain.uuid).frozen


def test_wrong_state_is_busy(lab: Lab) -> None:
    domain = lab.hypervisor.create("sim-1", {"vda": MIB}, state="OFF")
    vm = lab.document(domain)
    with pytest.raises(Busy, match="is off"):
        lab.tm("pre_backup_live", vm)
    lab.hypervisor.update(domain, state="RUNNING")
    with pytest.raises(Busy, match="is running"):
        lab.tm("pre_backup", vm)


def test_hypervisor_actions(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="is not there"):
        lab.vmm("monitor")
    domain = lab.hypervisor.create("sim-1", {"vda": MIB})
    lab.hypervisor.update(domain, frozen=True)
    lab.vmm("thaw", DOMAIN="sim-1")
    assert not lab.hypervisor.find("sim-1").frozen
    lab.vmm("abort_backup", DOMAIN=domain.uuid, SOCKET_DIR=str(tmp_path))
    definition = domain.to_xml()
    with pytest.raises(Conflict, match="already"):
        lab.vmm("define", DOMAIN=xmldoc.serialize(definition))
    xmldoc.put(definition, "name", "sim-2")
    with pytest.raises(Conflict, match="has the UUID"):
        lab.vmm("define", DOMAIN=xmldoc.serialize(definition))
    xmldoc.put(definition, "uuid", "")
    assert lab.vmm("define", DOMAIN=xmldoc.serialize(definition)) == {"DEPLOY_ID": "sim-2"}
    states = {
        xmldoc.text(entry, "NAME"): xmldoc.text(entry, "STATE")
        for entry in xmldoc.parse(lab.vmm("monitor")["DOMAINS"])
    }
    assert states == {"sim-1": "RUNNING", "sim-2": "OFF"}
    with pytest.raises(NotFound, match="sim-3"):
        lab.vmm("dump_xml", DOMAIN="sim-3")


def test_many_domains_at_once_are_told_as_each_alone(lab: Lab) -> None:
    made = [lab.hypervisor.create(f"sim-{number}", {"vda": MIB, "vdb": 512}) for number in range(3)]
    asked = [made[0].uuid, "11111111-0000-4000-8000-000000000001", made[2].uuid]
    told = xmldoc.parse(lab.vmm("dump_domains", DOMAINS=",".join(asked))["DOMAINS"])
    assert [xmldoc.text(entry, "UUID") for entry in told] == [made[0].uuid, made[2].uuid]
    for entry in told:
        alone = lab.vmm("dump_xml", DOMAIN=xmldoc.text(entry, "UUID"))
        assert xmldoc.text(entry, "STATE") == alone["STATE"]
        assert xmldoc.text(entry, "CAPACITY") == alone["CAPACITY"] == f"vda:{MIB},vdb:512"
        domain = entry.find("domain")
        assert domain is not None
        assert xmldoc.serialize(domain) == alone["DOMAIN"]


def test_what_is_restored_replaces_nothing_and_can_be_taken_back(lab: Lab, tmp_path: Path) -> None:
    (lab.directory / "files" / "domain.xml").write_text("<domain/>")
    target = tmp_path / "deep" / "er"
    where = {"DIRECTORY": str(target), "SOCKET_DIR": str(tmp_path / "nbd")}
    names = "disk.0.raw,domain.xml"

    def prepare() -> Path:
        answer = lab.tm("pre_restore", None, **where, DISKS="0:disk.0.raw:1048576", FORMAT="raw")
        disk = targets_from_xml(xmldoc.parse(answer["TARGETS"]))[0]
        assert disk.format == "raw"
        Path(disk.target).write_bytes(b"new")
        return Path(disk.target)

    prepare()
    made = prepare()  # again: what the first call made is gone
    assert not target.exists()
    for _ in range(2):
        lab.tm("restore", None, **where, NAMES=names)
    assert (target / "disk.0.raw").read_bytes() == b"new"
    assert (target / "disk.0.raw").stat().st_mode & 0o777 == 0o600
    (target / "theirs").touch()
    (target / "domain.xml").unlink()
    (target / "domain.xml").write_text("theirs")
    lab.tm("post_restore", None, **where, outcome=Outcome.FAILURE)
    assert sorted(path.name for path in target.iterdir()) == ["domain.xml", "theirs"]
    assert not made.parent.exists()
    with pytest.raises(Conflict, match=r"domain\.xml exists already"):
        prepare()
    (target / "domain.xml").unlink()
    prepare()
    lab.tm("restore", None, **where, NAMES=names)
    for _ in range(2):
        lab.tm("post_restore", None, **where, outcome=Outcome.SUCCESS)
    assert sorted(path.name for path in target.iterdir()) == ["disk.0.raw", "domain.xml", "theirs"]
