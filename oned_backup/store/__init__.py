"""Documents, restore points and the operation journal in one database."""

from oned_backup.store.backups import BackupState, NewestGood, Points, RestorePoint
from oned_backup.store.documents import Versioned
from oned_backup.store.journal import Journal
from oned_backup.store.journal_entries import Operation, OperationState, Step, StepState
from oned_backup.store.secrets import SecretBox
from oned_backup.store.store import Store, Transaction

__all__ = [
    "BackupState",
    "Journal",
    "NewestGood",
    "Operation",
    "OperationState",
    "Points",
    "RestorePoint",
    "SecretBox",
    "Step",
    "StepState",
    "Store",
    "Transaction",
    "Versioned",
]
