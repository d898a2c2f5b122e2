"""All kinds of operations, and the lock that each takes.

Everything that touches a VM's chains holds the VM's lock, so no chain ever has two
actions at once, and different VMs run side by side.
"""

from __future__ import annotations

from oned_backup.operations.backup import BACKUP
from oned_backup.operations.delete import DELETE, RETAIN
from oned_backup.operations.download import DOWNLOAD
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.import_store import IMPORT
from oned_backup.operations.restore import RESTORE
from oned_backup.operations.verify import VERIFY

KINDS: dict[str, OperationKind] = {
    kind.name: kind for kind in (BACKUP, RESTORE, DELETE, RETAIN, VERIFY, DOWNLOAD, IMPORT)
}


def vm_lock(vm_id: int) -> str:
    """The lock of everything that touches a VM or its chains."""
    return f"vm:{vm_id}"


def datastore_lock(datastore_id: int) -> str:
    """The lock of what concerns a datastore as a whole."""
    return f"datastore:{datastore_id}"
