"""What the kit knows of the stores and backups that it made: the daemon's catalogue in small."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.request import Backup
from oned_backup.model.increments import Increment, IncrementType
from oned_backup.runner.kit.guest import VM_XML, Point


@dataclass(frozen=True)
class Settings:
    """What a check was told: parameters for the datastore, and the driver.toml's table [kit].

    [kit]
    timeout_s = 120                   for one call
    parameters = { HOST = "localhost" }          where `--set` says nothing
    unreachable = { HOST = "192.0.2.1" }         with these, the store cannot be reached
    """

    parameters: Mapping[str, str] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 120


@dataclass
class Store:
    """A datastore: its parameters, and the images that the catalogue knows in it."""

    parameters: dict[str, str]
    #: the directory that only the kit uses, None where the store is somebody's
    own_path: Path | None
    image_ids: list[int] = field(default_factory=list)


@dataclass
class Chain:
    """One VM's backup image as the catalogue has it."""

    store: Store
    vm_id: int
    image_id: int
    increments: list[Increment] = field(default_factory=list)

    @property
    def image(self) -> xmldoc.Element:
        """The IMAGE document."""
        return xmldoc.build(
            "IMAGE",
            {
                "ID": self.image_id,
                "NAME": f"{self.vm_id} 21-Nov 02.37.00",
                "TYPE": 6,
                "SOURCE": self.increments[0].source if self.increments else "",
                "FORMAT": "raw",
                "VMS": {"ID": self.vm_id},
                "BACKUP_INCREMENTS": {"INCREMENT": [i.to_element() for i in self.increments]},
            },
        )

    @property
    def vm(self) -> xmldoc.Element:
        """The VM document, whose name is an odd one."""
        element = xmldoc.parse(VM_XML)
        xmldoc.put(element, "ID", self.vm_id)
        return element


@dataclass(frozen=True)
class Attempt:
    """A backup that is planned, tried or done."""

    chain: Chain
    point: Point
    backup: Backup

    @property
    def supposed(self) -> Chain:
        """The chain as if the backup were in the catalogue under the id that it was given."""
        backup = self.backup
        increment = Increment(backup.increment_id, -1, backup.date, 0, backup.id, IncrementType.FULL)
        return replace(self.chain, increments=[*self.chain.increments, increment])
