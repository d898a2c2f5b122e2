"""The action table: which kinds of driver there are, what each can do, what it must answer.

`share/doc/driver-spec.md` has a page for each entry. Daemon and drivers import
the same table, so neither can name an action or key that the other does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SPEC_VERSION = 1


class Kind(StrEnum):
    """The three layers of drivers; the value is the folder's name below `drivers/`."""

    TM = "tm"
    DATASTORE = "datastore"
    VMM = "vmm"

    @property
    def request_tag(self) -> str:
        """The root element of the request on stdin."""
        prefix = {"tm": "TM", "datastore": "DS", "vmm": "VMM"}[self.value]
        return f"{prefix}_DRIVER_ACTION_DATA"


@dataclass(frozen=True)
class Action:
    """One thing a driver can be told to do."""

    kind: Kind
    name: str
    #: keys that stdout must have on success
    required: tuple[str, ...] = ()
    #: further keys that the daemon understands
    optional: tuple[str, ...] = ()
    #: must every driver of this kind have it
    mandatory: bool = False
    #: stdout carries a disk's bytes instead of KEY=VALUE lines
    streams: bool = False


_TABLE = (
    Action(Kind.TM, "pre_backup", ("EXPORTS",), mandatory=True),
    Action(Kind.TM, "pre_backup_live", ("EXPORTS",)),
    Action(Kind.TM, "post_backup", mandatory=True),
    Action(Kind.TM, "post_backup_live"),
    Action(Kind.TM, "pre_restore", ("TARGETS",)),
    Action(Kind.TM, "restore"),
    Action(Kind.TM, "post_restore"),
    Action(
        Kind.DATASTORE,
        "backup",
        ("BACKUP_ID", "SIZE_MB", "FORMAT"),
        ("MANIFEST", "STORE_ID"),
        mandatory=True,
    ),
    Action(Kind.DATASTORE, "backup_cancel", mandatory=True),
    Action(Kind.DATASTORE, "ls", ("LISTING",), mandatory=True),
    Action(Kind.DATASTORE, "stat", ("SIZE_MB",), mandatory=True),
    Action(Kind.DATASTORE, "restore", ("PLAN",), mandatory=True),
    Action(Kind.DATASTORE, "download", optional=("BYTES", "SALVAGED"), streams=True, mandatory=True),
    Action(Kind.DATASTORE, "verify", ("REPORT",)),
    Action(Kind.DATASTORE, "increment_flatten", ("BACKUP_ID", "SIZE_MB", "CHAIN"), ("MANIFEST",)),
    Action(Kind.DATASTORE, "rm", mandatory=True),
    Action(Kind.DATASTORE, "monitor", ("TOTAL_MB", "USED_MB", "FREE_MB"), mandatory=True),
    Action(Kind.DATASTORE, "catalogue", ("CATALOGUE",), ("STORE_ID",)),
    Action(Kind.DATASTORE, "prune", optional=("FREED_MB",)),
    Action(Kind.VMM, "monitor", ("DOMAINS",), mandatory=True),
    Action(Kind.VMM, "dump_xml", ("DOMAIN", "STATE"), ("CAPACITY",), mandatory=True),
    Action(Kind.VMM, "dump_domains", ("DOMAINS",)),
    Action(Kind.VMM, "define", ("DEPLOY_ID",)),
    Action(Kind.VMM, "thaw"),
    Action(Kind.VMM, "abort_backup"),
)

ACTIONS: dict[tuple[Kind, str], Action] = {(action.kind, action.name): action for action in _TABLE}


def actions_of(kind: Kind) -> tuple[Action, ...]:
    """All actions of a kind of driver, in the order of the specification."""
    return tuple(action for action in _TABLE if action.kind is kind)
