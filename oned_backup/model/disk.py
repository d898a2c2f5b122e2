"""A VM's disks: read from libvirt's domain XML, kept as DISK elements.

TYPE says what lies behind a disk: FILE, BLOCK, NETWORK and so on as libvirt
names its sources, CDROM and FLOPPY for removable media whatever their source,
and FS (OpenNebula's word for a volatile disk) where libvirt has `<transient/>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from oned_backup import xmldoc
from oned_backup.model.document import replace_all, yes

MIB = 1024 * 1024

#: where libvirt keeps a source's name, by the disk's type
_SOURCE_ATTRIBUTE = {"file": "file", "block": "dev", "network": "name", "dir": "dir", "volume": "volume"}
_REMOVABLE = {"cdrom": "CDROM", "floppy": "FLOPPY"}


@dataclass(frozen=True)
class Disk:
    """One disk of a VM; `disk_id` never changes and is never given to another disk."""

    disk_id: int
    target: str
    source: str
    format: str
    type: str
    size_mb: int = 0
    read_only: bool = False


def disk_from_element(element: xmldoc.Element) -> Disk:
    """The typed form of a DISK element."""
    return Disk(
        disk_id=xmldoc.integer(element, "DISK_ID"),
        target=xmldoc.text(element, "TARGET"),
        source=element.findtext("SOURCE", ""),
        format=xmldoc.text(element, "FORMAT"),
        type=xmldoc.text(element, "TYPE", "FILE").upper(),
        size_mb=xmldoc.integer(element, "SIZE", 0),
        read_only=xmldoc.text(element, "READONLY").upper() == "YES",
    )


def disk_to_element(disk: Disk, old: xmldoc.Element | None = None) -> xmldoc.Element:
    """The DISK element: `old` (whose other children are kept) with the values of `disk`."""
    element = xmldoc.build("DISK") if old is None else xmldoc.copy(old)
    values: dict[str, str | int] = {
        "DISK_ID": disk.disk_id,
        "FORMAT": disk.format,
        "READONLY": yes(disk.read_only),
        "SIZE": disk.size_mb,
        "SOURCE": disk.source,
        "TARGET": disk.target,
        "TYPE": disk.type,
    }
    for name, value in values.items():
        replace_all(element, name, [xmldoc.build(name, value)])
    return element


def domain_disks(domain: xmldoc.Element, capacity_bytes: Mapping[str, int]) -> tuple[Disk, ...]:
    """The disks of a libvirt domain, all with id -1; `capacity_bytes` by target, 0 where unknown."""
    return tuple(_domain_disk(disk, capacity_bytes) for disk in domain.iterfind("devices/disk"))


def _domain_disk(element: xmldoc.Element, capacity_bytes: Mapping[str, int]) -> Disk:
    kind = element.get("type", "file")
    device = element.get("device", "disk")
    target = element.find("target")
    source = element.find("source")
    driver = element.find("driver")
    if device in _REMOVABLE:
        disk_type = _REMOVABLE[device]
    elif element.find("transient") is not None:
        disk_type = "FS"
    else:
        disk_type = kind.upper()
    name = "" if target is None else target.get("dev", "")
    return Disk(
        disk_id=-1,
        target=name,
        source="" if source is None else source.get(_SOURCE_ATTRIBUTE.get(kind, "file"), ""),
        format="raw" if driver is None else driver.get("type", "raw"),
        type=disk_type,
        size_mb=-(-capacity_bytes.get(name, 0) // MIB),
        read_only=element.find("readonly") is not None,
    )


def with_ids(found: Iterable[Disk], known: Iterable[Disk], next_id: int) -> tuple[tuple[Disk, ...], int]:
    """`found` with the ids of the `known` disks they are, new ids for the others, and the next free id.

    A disk is a known one if it has its source, else if it has its target (an
    external snapshot or a copy puts another file under the same target; whether
    the change tracking still holds is not decided here). Ids are never reused.
    """
    found = tuple(found)
    left = {disk.disk_id: disk for disk in known}
    given: dict[int, int] = {}
    for same in (_same_source, _same_target):
        for place, disk in enumerate(found):
            match = next((old for old in left.values() if place not in given and same(old, disk)), None)
            if match is not None:
                given[place] = match.disk_id
                del left[match.disk_id]
    numbered = []
    for place, disk in enumerate(found):
        disk_id = given.get(place, next_id)
        next_id = max(next_id, disk_id + 1)
        numbered.append(_numbered(disk, disk_id))
    return tuple(sorted(numbered, key=lambda disk: disk.disk_id)), next_id


def _numbered(disk: Disk, disk_id: int) -> Disk:
    return Disk(disk_id, disk.target, disk.source, disk.format, disk.type, disk.size_mb, disk.read_only)


def _same_source(old: Disk, new: Disk) -> bool:
    return bool(new.source) and old.source == new.source and _removable(old) == _removable(new)


def _same_target(old: Disk, new: Disk) -> bool:
    return old.target == new.target and _removable(old) == _removable(new)


def _removable(disk: Disk) -> bool:
    return disk.type in _REMOVABLE.values()
