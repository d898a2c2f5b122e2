"""The backup image document: IMAGE of TYPE 6, one for each chain and each MODE=FULL backup."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from enum import IntEnum

from oned_backup import xmldoc
from oned_backup.model.datastore import Datastore
from oned_backup.model.document import (
    Document,
    Owner,
    id_list,
    identity,
    ids,
    permissions,
)
from oned_backup.model.increments import Increment
from oned_backup.model.vm import Vm

BACKUP_TYPE = 6
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class ImageState(IntEnum):
    """STATE, as far as it is used here."""

    INIT = 0
    READY = 1
    DISABLED = 3
    LOCKED = 4
    ERROR = 5
    DELETE = 7


class Image(Document):
    """A backup image document. Its element must not be changed: use the functions of this module."""

    @property
    def owner(self) -> Owner:
        """Whom the image belongs to."""
        return Owner.of(self.element)

    @property
    def state_name(self) -> str:
        """The state as people know it."""
        return {int(state): state.name for state in ImageState}.get(self.state, f"STATE {self.state}")

    @property
    def is_ready(self) -> bool:
        """Whether it can be restored from."""
        return self.state == ImageState.READY

    @property
    def source(self) -> str:
        """The backup id of its first backup."""
        return xmldoc.text(self.element, "SOURCE")

    @property
    def size_mb(self) -> int:
        """What all its backups take in the store."""
        return xmldoc.integer(self.element, "SIZE")

    @property
    def created(self) -> int:
        """When its first backup was made, in seconds since 1970."""
        return xmldoc.integer(self.element, "REGTIME")

    @property
    def vm_id(self) -> int:
        """The VM it was made of, -1 if that is not known."""
        return next(iter(ids(self.element, "VMS")), -1)

    @property
    def datastore_id(self) -> int:
        """The datastore that keeps it."""
        return xmldoc.integer(self.element, "DATASTORE_ID")

    @property
    def datastore_name(self) -> str:
        """That datastore's name."""
        return self.element.findtext("DATASTORE", "")

    @property
    def increments(self) -> tuple[Increment, ...]:
        """The chain, oldest first; empty for a MODE=FULL backup."""
        found = self.element.iterfind("BACKUP_INCREMENTS/INCREMENT")
        return tuple(Increment.from_element(increment) for increment in found)

    @property
    def disk_ids(self) -> tuple[int, ...]:
        """The disks that any of its backups contains."""
        return ids(self.element, "BACKUP_DISK_IDS")

    @property
    def has_selected_disks(self) -> bool:
        """Whether DISK_IDS was set, so that the VM is not complete in it."""
        return xmldoc.text(self.element, "TEMPLATE/BACKUP_SELECTED_DISKS").upper() == "YES"

    @property
    def error(self) -> str:
        """What went wrong with it last."""
        return xmldoc.text(self.element, "TEMPLATE/ERROR")


def image_name(vm_id: int, date: int, taken: Collection[str] = ()) -> str:
    """`<vmid> %d-%b %H.%M.%S` (UTC), with a number appended if that is among `taken`."""
    when = datetime.fromtimestamp(date, UTC)
    name = f"{vm_id} {when.day:02}-{_MONTHS[when.month - 1]} {when:%H.%M.%S}"
    number = 1
    unique = name
    while unique in taken:
        number += 1
        unique = f"{name} ({number})"
    return unique


def new_image(
    image_id: int,
    *,
    vm: Vm,
    datastore: Datastore,
    name: str,
    source: str,
    date: int,
    size_mb: int,
    disk_ids: Iterable[int],
    increment: Increment | None = None,
    image_format: str = "raw",
    selected_disks: bool | None = None,
) -> Image:
    """The document of a first backup: of a chain if `increment` is given, else of MODE=FULL.

    It belongs to the owner of `vm`. `source` is the backup id; `image_format` is
    OpenNebula's word (`raw`, whatever the files are). `selected_disks`: whether DISK_IDS left
    out some; None: as `vm` is configured.
    """
    selected = bool(vm.config.disk_ids) if selected_disks is None else selected_disks
    element = xmldoc.build(
        "IMAGE",
        {
            **identity(image_id, name, vm.owner),
            "PERMISSIONS": permissions(),
            "TYPE": BACKUP_TYPE,
            "DISK_TYPE": 0,
            "PERSISTENT": 1,
            "REGTIME": date,
            "MODTIME": date,
            "SOURCE": source,
            "PATH": "",
            "FORMAT": image_format,
            "FS": "",
            "SIZE": size_mb,
            "STATE": int(ImageState.READY),
            "PREV_STATE": int(ImageState.READY),
            "RUNNING_VMS": 1,
            "CLONING_OPS": 0,
            "CLONING_ID": -1,
            "TARGET_SNAPSHOT": -1,
            "DATASTORE_ID": datastore.id,
            "DATASTORE": datastore.name,
            "VMS": id_list([vm.id]),
            "CLONES": None,
            "APP_CLONES": None,
            "TEMPLATE": {"BACKUP_SELECTED_DISKS": "YES"} if selected else None,
            "SNAPSHOTS": {"ALLOW_ORPHANS": "NO", "CURRENT_BASE": -1, "NEXT_SNAPSHOT": 0},
            "BACKUP_INCREMENTS": None if increment is None else increment.to_element(),
            "BACKUP_DISK_IDS": id_list(disk_ids),
        },
    )
    return Image(element)


def with_increment(image: Image, increment: Increment, disk_ids: Iterable[int]) -> Image:
    """`image` with a further increment; its size grows by the increment's."""
    element = xmldoc.copy(image.element)
    chain = [*image.increments, increment]
    _put_chain(element, chain)
    xmldoc.put(element, "MODTIME", increment.date)
    xmldoc.put(element, "BACKUP_DISK_IDS", id_list({*image.disk_ids, *disk_ids}))
    return Image(element)


def with_chain(image: Image, chain: Iterable[Increment]) -> Image:
    """`image` with that chain, oldest first; its size is the sum of theirs."""
    element = xmldoc.copy(image.element)
    _put_chain(element, list(chain))
    return Image(element)


def with_state(image: Image, state: ImageState) -> Image:
    """`image` in that state; the one it leaves becomes PREV_STATE."""
    if image.state == state:
        return image
    element = xmldoc.copy(image.element)
    xmldoc.put(element, "PREV_STATE", image.state)
    xmldoc.put(element, "STATE", int(state))
    return Image(element)


def _put_chain(element: xmldoc.Element, chain: list[Increment]) -> None:
    section = element.find("BACKUP_INCREMENTS")
    old = {} if section is None else {i.findtext("ID"): i for i in section}
    kept = []
    for increment in chain:
        new = increment.to_element()
        known = old.get(str(increment.id))
        if known is not None:  # what this version does not know of it stays
            new.extend(xmldoc.copy(child) for child in known if new.find(str(child.tag)) is None)
        kept.append(new)
    xmldoc.put(element, "BACKUP_INCREMENTS", kept)
    xmldoc.put(element, "SIZE", sum(increment.size_mb for increment in chain))
