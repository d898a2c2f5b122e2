"""What a backup's steps know of each other: the plan and the exports, as the journal has them."""

from __future__ import annotations

from dataclasses import dataclass

from oned_backup import xmldoc
from oned_backup.contract.exports import Exports
from oned_backup.contract.request import Backup
from oned_backup.operations.context import Context


@dataclass(frozen=True)
class BackupPlan:
    """What PLAN decided; it lies in the journal, and all later steps go by it."""

    vm_id: int
    live: bool
    #: how the datastore's driver wants the disks: `stream` or `staged`
    transfer: str
    datastore_id: int
    image_id: int | None
    backup_id: str
    parent_id: str
    increment_id: int
    date: int
    #: the checkpoint to make, and the one to keep if this backup fails; '' for none
    checkpoint: str
    old_checkpoint: str
    full_reason: str

    def backup(self, chain_id: str) -> Backup:
        """The request's BACKUP section."""
        return Backup(
            id=self.backup_id,
            chain_id=chain_id,
            increment_id=self.increment_id,
            date=self.date,
            parent_id=self.parent_id,
            checkpoint=self.checkpoint,
        )


def plan_of(context: Context) -> BackupPlan:
    """The plan in the journal."""
    return BackupPlan(**context.facts["plan"])


def exports_of(context: Context) -> Exports | None:
    """What PREPARE made, None if that is not known."""
    text = context.facts.get("exports")
    return None if text is None else Exports.from_xml(xmldoc.parse(text, what="EXPORTS"))


def live_name(action: str, *, live: bool) -> str:
    """The transfer manager's action for a domain that runs (`live`), or is off."""
    return f"{action}_live" if live else action
