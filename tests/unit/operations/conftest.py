"""A catalogue with one host, VM and datastore, and drivers that do what a test scripts."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from oned_backup import xmldoc
from oned_backup.config import Retry, Settings
from oned_backup.contract.exports import DiskExport, Exports, Reason, disk_file_name
from oned_backup.contract.request import Request
from oned_backup.daemon.directories import make_directories
from oned_backup.errors import Cancelled, NotFound
from oned_backup.model.datastore import new_datastore
from oned_backup.model.host import new_host
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import dump_manifest
from oned_backup.model.vm import DomainState, Placement, new_vm
from oned_backup.operations.context import Context
from oned_backup.operations.engine import run_operation
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.services import Services
from oned_backup.runner.drivers import Driver
from oned_backup.runner.run import Cancellation
from oned_backup.store import Operation, SecretBox, Store

DOMAIN = """<domain type='kvm'><name>web</name><uuid>9a1c2b3d-0000-4000-8000-000000000001</uuid>
  <devices><disk type='file' device='disk'><driver type='qcow2'/>
  <source file='/srv/web.qcow2'/><target dev='vda'/></disk></devices></domain>"""
GIB = 1024**3
_CLEANING = ("thaw", "abort_backup", "backup_cancel", "rm", "post_backup", "post_backup_live")


def no_ahead(*_: object, **__: object) -> None:
    """Scripted drivers have no process to start."""


@dataclass
class ScriptedDrivers:
    """Stands in for `run_action`. Answers like well-behaved drivers unless told otherwise.

    `script[action]`: what happens instead, one entry for each call: an error to raise, or a
    function of the request. None: the usual answer.
    """

    state: DomainState = DomainState.RUNNING
    calls: list[tuple[str, Request]] = field(default_factory=list)
    script: dict[str, list[Any]] = field(default_factory=dict)
    full_anyway: bool = False
    #: instead of the usual answers
    answers: dict[str, Callable[[Request], dict[str, str]]] = field(default_factory=dict)

    def __call__(
        self,
        driver: Driver,
        action: str,
        request: Request,
        _invocation: Any,
        *,
        cancellation: Cancellation | None = None,
        **_: Any,
    ) -> dict[str, str]:
        self.calls.append((action, request))
        if cancellation is not None and cancellation.cancelled:
            raise Cancelled(f"{driver} {action}")
        entries = self.script.get(action)
        step = entries.pop(0) if entries else None
        if isinstance(step, Exception):
            raise step
        if step is not None:
            step(request)
        usual: Callable[[Request], dict[str, str]] = getattr(self, f"_{action}", lambda _request: {})
        return self.answers.get(action, usual)(request)

    @property
    def actions(self) -> list[str]:
        """The names of the actions, in order."""
        return [action for action, _ in self.calls]

    def cleaning(self) -> list[str]:
        """The actions that take something back, in order."""
        return [name for name in self.actions if name in _CLEANING]

    def requests(self, action: str) -> list[Request]:
        """The requests of all calls of an action."""
        return [request for name, request in self.calls if name.removesuffix("_live") == action]

    def _dump_xml(self, _request: Request) -> dict[str, str]:
        domain = DOMAIN.replace("\n", " ")
        return {"DOMAIN": domain, "STATE": self.state.value, "CAPACITY": f"vda:{GIB}"}

    def _dump_domains(self, request: Request) -> dict[str, str]:
        dump = self.answers.get("dump_xml", self._dump_xml)
        found = []
        for uuid in request.options["DOMAINS"].split(","):
            try:
                answer = dump(replace(request, options={"DOMAIN": uuid}))
            except NotFound:
                continue
            values = {"UUID": uuid, "STATE": answer["STATE"], "CAPACITY": answer["CAPACITY"]}
            found.append(xmldoc.build("DOMAIN", {**values, "domain": [xmldoc.parse(answer["DOMAIN"])]}))
        return {"DOMAINS": xmldoc.serialize(xmldoc.build("DOMAINS", found))}

    def _monitor(self, request: Request) -> dict[str, str]:
        if request.datastore is not None:
            return {"TOTAL_MB": "1000", "USED_MB": "1", "FREE_MB": "999"}
        return {"DOMAINS": "<DOMAINS/>"}

    def _pre_backup(self, request: Request) -> dict[str, str]:
        backup = request.backup
        assert backup is not None
        whole = request.parent is None or self.full_anyway
        reason = (
            Reason.BITMAP_MISSING if request.parent is not None else Reason(request.options["FULL_REASON"])
        )
        increment = 0 if whole else backup.increment_id
        disk = DiskExport(
            disk_id=0,
            target="vda",
            file=disk_file_name(0, increment),
            type=BackupType.FULL if whole else BackupType.INCREMENT,
            reason=reason if whole else Reason.INCREMENT,
            size_bytes=GIB,
            format="qcow2",
            source="/srv/web.qcow2",
        )
        exports = Exports((disk,), increment, backup.checkpoint)
        return {"EXPORTS": xmldoc.serialize(exports.to_xml())}

    _pre_backup_live = _pre_backup

    def _backup(self, request: Request) -> dict[str, str]:
        backup, exports = request.backup, request.exports
        assert backup is not None
        assert exports is not None
        manifest = {
            "id": backup.id,
            "chain_id": backup.chain_id,
            "parent_id": backup.parent_id,
            "increment_id": backup.increment_id,
            "type": exports.type.value,
            "date": backup.date,
            "installation": request.options["INSTALLATION"],
            "checkpoint": exports.checkpoint,
            "vm": {"id": 0, "name": "web", "uuid": "9a1c2b3d-0000-4000-8000-000000000001"},
            "disks": [
                {
                    "disk_id": disk.disk_id,
                    "target": disk.target,
                    "type": disk.type.value,
                    "reason": disk.reason.value,
                    "file": disk.file,
                    "parent_id": backup.parent_id,
                    "size_bytes": disk.size_bytes,
                    "format": disk.format,
                    "source": disk.source,
                }
                for disk in exports.disks
            ],
            "files": [],
        }
        text = dump_manifest(manifest).decode()
        return {"BACKUP_ID": backup.id, "SIZE_MB": "5", "FORMAT": "raw", "MANIFEST": text}


@dataclass
class World:
    """The services over scripted drivers, with one VM (0) on host 0 and datastore 100."""

    services: Services
    drivers: ScriptedDrivers

    def run(self, kind: str, *, cancellation: Cancellation | None = None, **arguments: Any) -> Operation:
        """Queue an operation, claim it, and run it to its end."""
        journal = self.services.store.journal
        ids = {name: arguments.get(name) for name in ("vm_id", "image_id", "datastore_id")}
        queued = journal.enqueue(kind, f"test:{secrets.token_hex(4)}", arguments, **ids)
        operation = journal.claim(lambda entry: entry.id == queued.id)
        assert operation is not None
        context = Context(self.services, operation, cancellation=cancellation or Cancellation())
        run_operation(KINDS[kind], context)
        return journal.get(operation.id)

    def add_vm(self, name: str, domain: str) -> int:
        """A further running VM on host 0; its id."""
        element = self.services.store.create(
            "vm",
            lambda vm_id: (
                new_vm(
                    vm_id,
                    name=name,
                    placement=Placement(0, "local"),
                    domain=xmldoc.parse(domain),
                    state=DomainState.RUNNING,
                    capacity_bytes={"vda": GIB},
                    date=1,
                ).element
            ),
        )
        return xmldoc.integer(element, "ID")

    def add_datastore(self) -> int:
        """A further datastore; its id."""
        path = self.services.settings.state_dir.parent
        element = self.services.store.create(
            "datastore",
            lambda number: (
                new_datastore(
                    number, name=f"b{number}", ds_mad="fs", parameters={"BASE_PATH": str(path / str(number))}
                ).element
            ),
        )
        return xmldoc.integer(element, "ID")

    def run_queued(self) -> None:
        """Run what operations have queued themselves."""
        while (operation := self.services.store.journal.claim()) is not None:
            run_operation(KINDS[operation.kind], Context(self.services, operation))

    def step_names(self, operation: Operation) -> list[str]:
        """`NAME STATE` of all steps in the journal."""
        return [f"{step.name} {step.state}" for step in self.services.store.journal.steps(operation.id)]


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database without anything in it: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("empty", numbered=True) / "oned-backup.sqlite"
    path.parent.chmod(0o700)
    Store.open(path).close()
    return path


@pytest.fixture
def world(tmp_path: Path, empty_database: Path) -> Iterator[World]:
    """See `World`."""
    with new_world(tmp_path, empty_database) as made:
        yield made


@contextmanager
def new_world(tmp_path: Path, empty_database: Path) -> Iterator[World]:
    """A world of its own in a directory."""
    settings = Settings(
        state_dir=tmp_path / "state",
        run_dir=tmp_path / "run",
        retry=Retry(for_s=1, first_wait_s=0.01, longest_wait_s=0.02),
    )
    make_directories(settings)
    shutil.copy(empty_database, settings.database)
    drivers = ScriptedDrivers()
    with Store.open(settings.database) as store:
        services = Services(store, settings, SecretBox.open(settings.state_dir / "key"), drivers, no_ahead)
        store.create("host", lambda host_id: new_host(host_id, name="local").element)
        store.create(
            "datastore",
            lambda number: (
                new_datastore(number, name="b", ds_mad="fs", parameters={"BASE_PATH": str(tmp_path)}).element
            ),
        )
        world = World(services, drivers)
        world.add_vm("web", DOMAIN)
        yield world
