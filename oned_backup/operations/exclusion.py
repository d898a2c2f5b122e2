"""Which operations may run at the same time: the locks that they hold, and what waits for what.

The journal holds that no two operations of one lock run. What more is needed depends on
what an operation does to the VM's restore points:

    lock          operations
    vm:<id>         backup (adds one), untrack (its chain ends), restore, verify, download (read),
                  cut, delete (take away)
    retention:<id>  retention, flatten: they make new backups and switch the catalogue to them
    removal:<id>    remove: takes from the store what the catalogue does not need any more
    datastore:<id>  import; the download from a datastore of what no known VM has
    prune:<id>      prune
    scrub:<id>      scrub

So backups and restores run beside a merge. `must_wait_for` adds: nothing is removed while an
operation runs that may have begun to read it, since it started when the catalogue still
named it; and nothing is deleted or cut off on demand while retention works on the VM, nor the reverse.
One that reads and starts later finds the new catalogue, so it need not wait.
"""

from __future__ import annotations

from collections.abc import Iterable

from oned_backup.store import Operation

#: what nobody waits for: it must leave workers to backups and restores
BACKGROUND = frozenset({"flatten", "remove", "prune"})
_READING = frozenset({"restore", "verify", "download"})
_RETAINING = frozenset({"retention", "flatten", "remove"})
_TAKING = frozenset({"delete", "cut"})
_EXCLUDED: dict[str, frozenset[str]] = {
    "remove": _READING | {"delete"},
    "retention": _TAKING,
    "flatten": _TAKING,
    "delete": _RETAINING,
    "cut": _RETAINING - {"remove"},
}


def vm_lock(vm_id: int) -> str:
    """The lock of what adds to a VM's chains or reads them."""
    return f"vm:{vm_id}"


def datastore_lock(datastore_id: int) -> str:
    """The lock of what concerns a datastore as a whole."""
    return f"datastore:{datastore_id}"


def retention_lock(vm_id: int) -> str:
    """The lock of what decides which restore points of a VM stay."""
    return f"retention:{vm_id}"


def removal_lock(vm_id: int) -> str:
    """The lock of taking a VM's backups from the store."""
    return f"removal:{vm_id}"


def prune_lock(datastore_id: int) -> str:
    """The lock that lets one prune of a datastore run at a time."""
    return f"prune:{datastore_id}"


def scrub_lock(datastore_id: int) -> str:
    """The lock that lets one scrub of a datastore run at a time."""
    return f"scrub:{datastore_id}"


def must_wait_for(operation: Operation, running: Iterable[Operation]) -> Operation | None:
    """The running operation, with another lock, that `operation` must not run beside; None: it may run."""
    excluded = _EXCLUDED.get(operation.kind, frozenset())
    for other in running:
        # a download of a backup that the catalogue does not name is of no known VM
        same = other.vm_id == operation.vm_id or other.vm_id is None
        if same and other.kind in excluded and other.id != operation.id:
            return other
    return None
