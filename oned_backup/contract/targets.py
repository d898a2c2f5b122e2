"""Where a restore is to write: what the daemon asks a transfer manager for, and its answer TARGETS.

    DISKS=0:disk.0.qcow2:8589934592,1:…                     option: id, file name, bytes of the disk
    <TARGETS> <DISK> DISK_ID TARGET FORMAT </DISK>* </TARGETS>

TARGET and FORMAT are for the datastore's `download`: a path on the daemon's machine and the
format that the file is to have, or an NBD export and `raw`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model.names import checked_name

FORMATS = ("qcow2", "raw")


def checked_format(name: str) -> str:
    """`name`, which is `InvalidInput` if it is no format that disks are restored to."""
    if name not in FORMATS:
        raise InvalidInput(f"format '{name[:20]}' is none of {', '.join(FORMATS)}")
    return name


@dataclass(frozen=True)
class NewDisk:
    """A disk that a restore is going to make."""

    disk_id: int
    #: of the file
    name: str
    #: of the guest's disk
    size_bytes: int


@dataclass(frozen=True)
class DiskTarget:
    """What one disk is to be downloaded to, and as what."""

    disk_id: int
    target: str
    format: str

    @property
    def is_export(self) -> bool:
        """Whether it is an NBD export, and no path."""
        return not self.target.startswith("/")


def disks_option(disks: Sequence[NewDisk]) -> str:
    """The option DISKS."""
    return ",".join(f"{disk.disk_id}:{disk.name}:{disk.size_bytes}" for disk in disks)


def parse_disks(text: str) -> tuple[NewDisk, ...]:
    """The disks of the option DISKS; `InvalidInput` for anything else."""
    disks = []
    for entry in filter(None, text.split(",")):
        parts = entry.split(":")
        if len(parts) != 3 or not (parts[0].isdecimal() and parts[2].isdecimal()):
            raise InvalidInput(f"option DISKS: '{entry[:80]}' is not ID:NAME:BYTES")
        disks.append(NewDisk(int(parts[0]), checked_name(parts[1], "name of a disk's file"), int(parts[2])))
    return tuple(disks)


def targets_to_xml(targets: Sequence[DiskTarget]) -> xmldoc.Element:
    """The answer TARGETS."""
    return xmldoc.build(
        "TARGETS",
        [
            xmldoc.build(
                "DISK", {"DISK_ID": target.disk_id, "TARGET": target.target, "FORMAT": target.format}
            )
            for target in targets
        ],
    )


def targets_from_xml(element: xmldoc.Element) -> dict[int, DiskTarget]:
    """The typed answer, by disk."""
    found = {}
    for disk in element.findall("DISK"):
        disk_id = xmldoc.integer(disk, "DISK_ID")
        found[disk_id] = DiskTarget(disk_id, xmldoc.text(disk, "TARGET"), xmldoc.text(disk, "FORMAT"))
    return found
