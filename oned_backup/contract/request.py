"""The request: one XML document on a driver's stdin.

    <DS_DRIVER_ACTION_DATA>                      TM_…, VMM_… for the other kinds
      <OPERATION> ID KIND OUTCOME? </OPERATION>
      <BACKUP> ID CHAIN_ID PARENT_ID? INCREMENT_ID DATE CHECKPOINT? </BACKUP>
      <HOST> … </HOST> <VM> … </VM> <DATASTORE> … </DATASTORE> <IMAGE> … </IMAGE>
      <EXPORTS> … </EXPORTS>                     what pre_backup returned
      <PARENT> <EXPORTS> … </EXPORTS> </PARENT>  those of the backup that this one continues
      <CATALOGUE> … </CATALOGUE>                 manifests that the daemon has, if the store has lost one
      <TEMPLATE> … </TEMPLATE>                   the caller's options, flat
    </DS_DRIVER_ACTION_DATA>

HOST, VM, DATASTORE and IMAGE are OpenNebula's documents, whole. A section that an
action does not need may be absent. Secret parameters of a datastore are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.errors import InvalidInput
from oned_backup.model.names import checked_name

if TYPE_CHECKING:
    from oned_backup.contract.documents import Catalogue
    from oned_backup.contract.exports import Exports


class Outcome(StrEnum):
    """What became of the backup, told to `post_backup`."""

    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True)
class Backup:
    """The place of the backup at hand in its chain; ids are chosen by the daemon beforehand."""

    id: str
    chain_id: str
    increment_id: int
    date: int
    parent_id: str = ""
    #: name for the checkpoint and bitmaps to make; empty: make none (MODE=FULL)
    checkpoint: str = ""


@dataclass(frozen=True)
class Request:
    """Everything a driver is told. Build it, `to_xml` it; the SDK gives it back typed."""

    kind: Kind
    operation_id: str
    operation_kind: str
    outcome: Outcome | None = None
    backup: Backup | None = None
    host: xmldoc.Element | None = None
    vm: xmldoc.Element | None = None
    datastore: xmldoc.Element | None = None
    image: xmldoc.Element | None = None
    exports: Exports | None = None
    parent: Exports | None = None
    catalogue: Catalogue | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def to_xml(self) -> xmldoc.Element:
        """The document for stdin; sections are copied, the originals stay where they are."""
        root = xmldoc.build(self.kind.request_tag)
        operation: dict[str, xmldoc.Content] = {"ID": self.operation_id, "KIND": self.operation_kind}
        if self.outcome is not None:
            operation["OUTCOME"] = self.outcome.value
        root.append(xmldoc.build("OPERATION", operation))
        if self.backup is not None:
            root.append(
                xmldoc.build(
                    "BACKUP",
                    {
                        "ID": self.backup.id,
                        "CHAIN_ID": self.backup.chain_id,
                        "PARENT_ID": self.backup.parent_id,
                        "INCREMENT_ID": self.backup.increment_id,
                        "DATE": self.backup.date,
                        "CHECKPOINT": self.backup.checkpoint,
                    },
                )
            )
        for document in (self.host, self.vm, self.datastore, self.image):
            if document is not None:
                root.append(xmldoc.copy(document))
        if self.exports is not None:
            root.append(self.exports.to_xml())
        if self.parent is not None:
            root.append(xmldoc.build("PARENT", self.parent.to_xml()))
        if self.catalogue is not None:
            root.append(self.catalogue.to_xml())
        root.append(xmldoc.build("TEMPLATE", dict(self.options)))
        return root

    @classmethod
    def from_xml(cls, root: xmldoc.Element) -> Request:
        """The typed form; `InvalidInput` names what is absent or wrong."""
        kinds = {kind.request_tag: kind for kind in Kind}
        if root.tag not in kinds:
            raise InvalidInput(f"request: root element {root.tag} is none of {', '.join(kinds)}")
        template = root.find("TEMPLATE")
        return cls(
            kind=kinds[root.tag],
            operation_id=checked_name(xmldoc.text(root, "OPERATION/ID"), "OPERATION/ID"),
            operation_kind=xmldoc.text(root, "OPERATION/KIND"),
            outcome=_outcome(root),
            backup=_backup_from_xml(root.find("BACKUP")),
            host=root.find("HOST"),
            vm=root.find("VM"),
            datastore=root.find("DATASTORE"),
            image=root.find("IMAGE"),
            exports=_exports(root.find("EXPORTS")),
            parent=_exports(root.find("PARENT/EXPORTS")),
            catalogue=_catalogue(root.find("CATALOGUE")),
            options={} if template is None else {str(o.tag): o.text or "" for o in template},
        )


def _outcome(root: xmldoc.Element) -> Outcome | None:
    text = xmldoc.text(root, "OPERATION/OUTCOME")
    try:
        return Outcome(text) if text else None
    except ValueError as error:
        raise InvalidInput(f"OPERATION/OUTCOME: {error}") from error


def _exports(element: xmldoc.Element | None) -> Exports | None:
    if element is None:
        return None
    from oned_backup.contract.exports import Exports  # noqa: PLC0415 - half of all actions have none

    return Exports.from_xml(element)


def _catalogue(element: xmldoc.Element | None) -> Catalogue | None:
    if element is None:
        return None
    from oned_backup.contract.documents import Catalogue  # noqa: PLC0415 - only what reads stored backups has one

    return Catalogue.from_xml(element)


def _backup_from_xml(element: xmldoc.Element | None) -> Backup | None:
    if element is None:
        return None
    return Backup(
        id=checked_name(xmldoc.text(element, "ID"), "BACKUP/ID"),
        chain_id=checked_name(xmldoc.text(element, "CHAIN_ID"), "BACKUP/CHAIN_ID"),
        parent_id=xmldoc.text(element, "PARENT_ID"),
        increment_id=xmldoc.integer(element, "INCREMENT_ID"),
        date=xmldoc.integer(element, "DATE"),
        checkpoint=xmldoc.text(element, "CHECKPOINT"),
    )
