"""A hypervisor without virtual machines: domains are JSON files, their disks sparse raw files.

    <root>/<uuid>.json      {"name", "uuid", "state", "frozen", "disks": [{"target", "source"}]}

For tests and simulations with more domains than any machine could run. Its URI
is `dummy:///<root>`. The files are replaced by rename, so that readers never see half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.errors import Conflict, InvalidInput, NotFound, Unavailable

_SCHEME = "dummy://"


@dataclass(frozen=True)
class DummyDisk:
    """A disk: a sparse raw file."""

    target: str
    source: str

    @property
    def size_bytes(self) -> int:
        """Virtual size, which is the file's."""
        return Path(self.source).stat().st_size


@dataclass(frozen=True)
class DummyDomain:
    """A domain. `state` is RUNNING, PAUSED, OFF or CRASHED."""

    name: str
    uuid: str
    state: str = "OFF"
    frozen: bool = False
    disks: tuple[DummyDisk, ...] = ()

    def to_xml(self) -> xmldoc.Element:
        """What libvirt's XML of such a domain would be, as far as anybody looks at it."""
        root = xmldoc.build(
            "domain",
            {"name": self.name, "uuid": self.uuid, "memory": "1048576", "vcpu": "1", "devices": None},
        )
        root.set("type", "dummy")
        devices = root.find("devices")
        assert devices is not None  # noqa: S101 - just built
        for disk in self.disks:
            element = xmldoc.build("disk", {"driver": None, "source": None, "target": None})
            element.attrib.update({"type": "file", "device": "disk"})
            for tag, attribute, value in (
                ("driver", "type", "raw"),
                ("source", "file", disk.source),
                ("target", "dev", disk.target),
            ):
                child = element.find(tag)
                assert child is not None  # noqa: S101
                child.set(attribute, value)
            devices.append(element)
        return root


class DummyHost:
    """All domains of one directory."""

    def __init__(self, uri: str) -> None:
        self.root = Path(uri.removeprefix(_SCHEME))
        if not uri.startswith(_SCHEME) or not self.root.is_absolute():
            raise InvalidInput(
                f"'{uri}' is not a URI of the dummy hypervisor", hint="Use dummy:///DIRECTORY."
            )

    def domains(self) -> Iterator[DummyDomain]:
        """All domains, by name; `Unavailable` if the directory is absent."""
        if not self.root.is_dir():
            raise Unavailable(f"dummy hypervisor: {self.root} is not there")
        found = [_load(path) for path in self.root.glob("*.json")]
        yield from sorted(found, key=lambda domain: domain.name)

    def find(self, key: str) -> DummyDomain:
        """The domain of that UUID, else of that name; `NotFound` if there is none."""
        path = self.root / f"{key}.json"
        if "/" not in key and path.exists():
            return _load(path)
        for domain in self.domains():
            if domain.name == key:
                return domain
        raise NotFound(f"domain {key} is not defined on the host")

    def find_all(self, uuids: Iterable[str]) -> Iterator[DummyDomain]:
        """Those of these domains that there are."""
        for uuid in uuids:
            with suppress(NotFound):
                yield self.find(uuid)

    def create(self, name: str, sizes: Mapping[str, int], *, state: str = "RUNNING") -> DummyDomain:
        """A new domain with empty disks of these sizes in bytes, by target."""
        uuid = _new_uuid()
        disks = []
        self.root.mkdir(parents=True, exist_ok=True)
        for target, size_bytes in sizes.items():
            source = self.root / f"{uuid}-{target}.raw"
            with source.open("wb") as file:
                file.truncate(size_bytes)
            disks.append(DummyDisk(target, str(source)))
        domain = DummyDomain(name, uuid, state, disks=tuple(disks))
        self._save(domain)
        return domain

    def define(self, xml: xmldoc.Element) -> DummyDomain:
        """A new domain, off, from XML; `Conflict` if the name or the UUID is taken."""
        name, uuid = xmldoc.text(xml, "name"), xmldoc.text(xml, "uuid") or _new_uuid()
        for domain in self.domains():
            if domain.name == name:
                raise Conflict(f"the host has a domain named {name} already")
            if domain.uuid == uuid:
                raise Conflict(f"domain {domain.name} has the UUID {uuid} already")
        disks = []
        for element in xml.iterfind("devices/disk"):
            source, target = element.find("source"), element.find("target")
            if source is not None and target is not None and source.get("file"):
                disks.append(DummyDisk(target.get("dev", ""), source.get("file", "")))
        domain = DummyDomain(name, uuid, disks=tuple(disks))
        self._save(domain)
        return domain

    def update(self, domain: DummyDomain, *, state: str | None = None, frozen: bool | None = None) -> None:
        """Change what is given."""
        new = replace(domain, state=state or domain.state)
        self._save(new if frozen is None else replace(new, frozen=frozen))

    def _save(self, domain: DummyDomain) -> None:
        temporary = self.root / f".{domain.uuid}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(domain)))
        temporary.replace(self.root / f"{domain.uuid}.json")


def checkpoint_path(source: str, checkpoint: str) -> Path:
    """The copy of a disk that is its checkpoint."""
    return Path(f"{source}.{checkpoint}")


def _new_uuid() -> str:
    from uuid import uuid4  # noqa: PLC0415 - brings much along that the other actions do without

    return str(uuid4())


def _load(path: Path) -> DummyDomain:
    raw = json.loads(path.read_text())
    disks = tuple(DummyDisk(**disk) for disk in raw.pop("disks"))
    return DummyDomain(**raw, disks=disks)
