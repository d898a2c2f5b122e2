"""What the daemon's log says of an operation, on one line each time: what it is of, and how it ended.

backup op-5c1f2a3b4d5e of VM 7 (web): begins
backup op-5c1f2a3b4d5e of VM 7 (web): DONE in 8.1 s: image_id=3 increment_id=12 type=INCREMENT size_mb=310
"""

from __future__ import annotations

import json

from oned_backup import xmldoc
from oned_backup.errors import OnedBackupError
from oned_backup.store import Operation, Store


def named(store: Store, operation: Operation) -> str:
    """The operation with the VM, or else the datastore, that it is of."""
    text = f"{operation.kind} {operation.id}"
    if operation.vm_id is not None:
        return f"{text} of VM {operation.vm_id} ({name_of(store, 'vm', operation.vm_id)})"
    if (datastore_id := operation.datastore_id) is not None:
        return f"{text} of datastore {datastore_id} ({name_of(store, 'datastore', datastore_id)})"
    return text


def name_of(store: Store, kind: str, document_id: int) -> str:
    """A document's name; empty if it has been forgotten since, or cannot be read now."""
    try:
        return xmldoc.text(store.get(kind, document_id).element, "NAME", "")
    except OnedBackupError:
        return ""


def outcome(operation: Operation) -> str:
    """How an operation stands after it ran: its state, how long it took, its error or what it came to."""
    took = ""
    if operation.started_at is not None and operation.ended_at is not None:
        took = f" in {operation.ended_at - operation.started_at:.1f} s"
    if operation.error:
        said = json.loads(operation.error)["message"]
    else:
        said = " ".join(
            f"{key}={value}"
            for key, value in operation.result.items()
            if isinstance(value, int | float | str)
        )
    return f"{operation.state}{took}{f': {said}' if said else ''}"
