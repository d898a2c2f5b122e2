"""The backup datastore document: DATASTORE of TYPE 3 with its driver's parameters in TEMPLATE.

A parameter that the driver declares secret is stored sealed (see
`store.secrets`): `sealed:v1:…`. `masked` gives the document for people,
`without_secrets` the one for drivers, which get secrets as files.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model.document import (
    ADMINISTRATOR,
    Document,
    add_id,
    checked_title,
    id_list,
    identity,
    ids,
    permissions,
    replace_all,
    section,
    shown,
)
from oned_backup.model.names import checked_name

BACKUP_TYPE = 3
#: what a sealed parameter's text begins with, and what is shown in place of it
SEALED_PREFIX = "sealed:v1:"
MASK = "***"

#: TEMPLATE's elements that are not the driver's parameters
_NOT_PARAMETERS = frozenset({"NAME", "TYPE", "DS_MAD", "TM_MAD", "ERROR", "DISABLED_REASON"})


class DatastoreState(IntEnum):
    """STATE: a disabled datastore takes no new backups."""

    READY = 0
    DISABLED = 1


class Datastore(Document):
    """A datastore document. Its element must not be changed: use the functions of this module."""

    @property
    def ds_mad(self) -> str:
        """The name of its driver."""
        return xmldoc.text(self.element, "DS_MAD")

    @property
    def base_path(self) -> str:
        """Where the driver keeps its backups, empty for drivers without a path."""
        return self.element.findtext("BASE_PATH", "")

    @property
    def is_enabled(self) -> bool:
        """Whether it takes new backups."""
        return self.state == DatastoreState.READY

    @property
    def disabled_reason(self) -> str:
        """Why it was disabled."""
        return xmldoc.text(self.element, "TEMPLATE/DISABLED_REASON")

    @property
    def total_mb(self) -> int:
        """Capacity as last measured, 0 if it never was."""
        return xmldoc.integer(self.element, "TOTAL_MB")

    @property
    def free_mb(self) -> int:
        """Free space as last measured."""
        return xmldoc.integer(self.element, "FREE_MB")

    @property
    def used_mb(self) -> int:
        """Used space as last measured."""
        return xmldoc.integer(self.element, "USED_MB")

    @property
    def store_id(self) -> str:
        """What tells the store that keeps its images from others; empty if that is not known."""
        return self.element.findtext("STORE_ID", "")

    @property
    def image_ids(self) -> tuple[int, ...]:
        """The images that it keeps."""
        return ids(self.element, "IMAGES")

    @property
    def parameters(self) -> dict[str, str]:
        """The driver's parameters as stored; sealed ones are still sealed."""
        return {
            str(child.tag): child.text or ""
            for child in self.element.iterfind("TEMPLATE/*")
            if child.tag not in _NOT_PARAMETERS and len(child) == 0
        }

    @property
    def sealed_parameters(self) -> dict[str, str]:
        """Those of the parameters that are sealed."""
        return {name: text for name, text in self.parameters.items() if text.startswith(SEALED_PREFIX)}


def new_datastore(
    datastore_id: int,
    *,
    name: str,
    ds_mad: str,
    parameters: Mapping[str, str],
) -> Datastore:
    """The document of a new backup datastore; `parameters` checked, defaults filled in, secrets sealed."""
    element = xmldoc.build(
        "DATASTORE",
        {
            **identity(datastore_id, name, ADMINISTRATOR),
            "PERMISSIONS": permissions(),
            "DS_MAD": ds_mad,
            "TM_MAD": "-",
            "BASE_PATH": "",
            "TYPE": BACKUP_TYPE,
            "DISK_TYPE": 0,
            "STATE": int(DatastoreState.READY),
            "CLUSTERS": id_list([0]),
            "TOTAL_MB": 0,
            "FREE_MB": 0,
            "USED_MB": 0,
            "IMAGES": None,
            "TEMPLATE": None,
        },
    )
    return with_parameters(Datastore(element), parameters)


def with_parameters(datastore: Datastore, parameters: Mapping[str, str]) -> Datastore:
    """`datastore` with exactly these parameters; BASE_PATH is also written to the element of that name."""
    wrong = _NOT_PARAMETERS & set(parameters)
    if wrong:
        raise InvalidInput(f"{min(wrong)} is not a parameter of a driver")
    element = xmldoc.copy(datastore.element)
    template = section(element, "TEMPLATE")
    for name in set(datastore.parameters) - set(parameters):
        replace_all(template, name, [])
    for name, value in parameters.items():
        replace_all(template, name, [xmldoc.build(name, value)])
    xmldoc.put(element, "BASE_PATH", parameters.get("BASE_PATH", ""))
    return Datastore(element)


def with_capacity(datastore: Datastore, *, total_mb: int, used_mb: int, free_mb: int) -> Datastore:
    """`datastore` as last measured."""
    element = xmldoc.copy(datastore.element)
    for name, value in (("TOTAL_MB", total_mb), ("FREE_MB", free_mb), ("USED_MB", used_mb)):
        xmldoc.put(element, name, value)
    return Datastore(element)


def in_store(datastore: Datastore, store_id: str) -> Datastore:
    """`datastore` before its first image, in the store of that id; one that has images stays where it is."""
    if not store_id or datastore.image_ids:
        return datastore
    element = xmldoc.copy(datastore.element)
    xmldoc.put(element, "STORE_ID", checked_name(store_id, "STORE_ID"))
    return Datastore(element)


def with_image(datastore: Datastore, image_id: int) -> Datastore:
    """`datastore` keeping a further image."""
    element = xmldoc.copy(datastore.element)
    add_id(element, "IMAGES", image_id)
    return Datastore(element)


def without_image(datastore: Datastore, image_id: int) -> Datastore:
    """`datastore` without that image."""
    element = xmldoc.copy(datastore.element)
    xmldoc.put(element, "IMAGES", id_list(set(datastore.image_ids) - {image_id}))
    return Datastore(element)


def disabled(datastore: Datastore, reason: str) -> Datastore:
    """`datastore` that takes no new backups, and why."""
    element = xmldoc.copy(datastore.element)
    xmldoc.put(element, "STATE", int(DatastoreState.DISABLED))
    xmldoc.put(section(element, "TEMPLATE"), "DISABLED_REASON", shown(reason))
    return Datastore(element)


def enabled(datastore: Datastore) -> Datastore:
    """`datastore` that takes backups again."""
    element = xmldoc.copy(datastore.element)
    xmldoc.put(element, "STATE", int(DatastoreState.READY))
    replace_all(section(element, "TEMPLATE"), "DISABLED_REASON", [])
    return Datastore(element)


def with_name(datastore: Datastore, name: str) -> Datastore:
    """`datastore` under another name."""
    element = xmldoc.copy(datastore.element)
    xmldoc.put(element, "NAME", checked_title(name))
    return Datastore(element)


def masked(datastore: Datastore) -> xmldoc.Element:
    """The document with `***` in place of what is sealed: for people."""
    element = xmldoc.copy(datastore.element)
    for child in element.iterfind("TEMPLATE/*"):
        if (child.text or "").startswith(SEALED_PREFIX):
            child.text = MASK
    return element


def without_secrets(datastore: Datastore) -> xmldoc.Element:
    """The document without sealed parameters: for a driver's request."""
    element = xmldoc.copy(datastore.element)
    for name in datastore.sealed_parameters:
        replace_all(section(element, "TEMPLATE"), name, [])
    return element
