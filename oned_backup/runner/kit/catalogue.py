"""What the kit knows of the stores and backups that it made: the daemon's catalogue in small."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.request import Backup
from oned_backup.model.increments import BackupType, Increment
from oned_backup.runner.kit.guest import VM_XML, Point


@dataclass
class Store:
    """A datastore: its parameters, and the images that the catalogue knows in it.

    `own_path`: the directory with its files, if only the kit uses it. `name`: how commands call
    it, if it was made by one.
    """

    parameters: dict[str, str]
    own_path: Path | None
    name: str = ""
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
        increment = Increment(backup.increment_id, -1, backup.date, 0, backup.id, BackupType.FULL)
        return replace(self.chain, increments=[*self.chain.increments, increment])
