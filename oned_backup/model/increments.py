"""BACKUP_INCREMENTS: the chain of a backup image, and what a restore or retention makes of it.

    <INCREMENT> DATE ID PARENT_ID SIZE SOURCE TYPE </INCREMENT>*      oldest first

Ids ascend and are never used again. PARENT_ID is -1 for the first. SOURCE is
the backup id under which the store keeps it. The chain of one disk may be
shorter than the image's: a disk that had to be stored whole inside an increment
starts again there, which the manifests tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from oned_backup import xmldoc
from oned_backup.errors import Conflict, InvalidInput, NotFound

#: PARENT_ID of an increment that starts a chain
NO_PARENT = -1


class BackupType(StrEnum):
    """Whether an increment, or the file of a disk, stands alone or continues the one before it."""

    FULL = "FULL"
    INCREMENT = "INCREMENT"


@dataclass(frozen=True)
class Increment:
    """One restore point of a chain; `date` in seconds since 1970."""

    id: int
    parent_id: int
    date: int
    size_mb: int
    source: str
    type: BackupType

    @classmethod
    def from_element(cls, element: xmldoc.Element) -> Increment:
        """The typed form of an INCREMENT element."""
        kind = xmldoc.text(element, "TYPE").upper()
        if kind not in set(BackupType):
            raise InvalidInput(f"INCREMENT/TYPE: '{kind[:40]}' is none of {', '.join(BackupType)}")
        return cls(
            id=xmldoc.integer(element, "ID"),
            parent_id=xmldoc.integer(element, "PARENT_ID", NO_PARENT),
            date=xmldoc.integer(element, "DATE"),
            size_mb=xmldoc.integer(element, "SIZE"),
            source=xmldoc.text(element, "SOURCE"),
            type=BackupType(kind),
        )

    def to_element(self) -> xmldoc.Element:
        """The INCREMENT element."""
        return xmldoc.build(
            "INCREMENT",
            {
                "DATE": self.date,
                "ID": self.id,
                "PARENT_ID": self.parent_id,
                "SIZE": self.size_mb,
                "SOURCE": self.source,
                "TYPE": self.type.value,
            },
        )


def next_increment(chain: Sequence[Increment], *, date: int, size_mb: int, source: str) -> Increment:
    """The increment that continues `chain` (empty: the full backup that starts it, id 0)."""
    if any(increment.source == source for increment in chain):
        raise Conflict(f"backup {source} is in the chain already")
    if not chain:
        return Increment(0, NO_PARENT, date, size_mb, source, BackupType.FULL)
    last = chain[-1].id
    return Increment(last + 1, last, date, size_mb, source, BackupType.INCREMENT)


def chain_to(chain: Sequence[Increment], increment_id: int | None = None) -> tuple[Increment, ...]:
    """The increments from the first up to `increment_id` (None: the newest); `NotFound` if not there."""
    if not chain:
        raise NotFound("the image has no increments")
    wanted = chain[-1].id if increment_id is None else increment_id
    for place, increment in enumerate(chain):
        if increment.id == wanted:
            return tuple(chain[: place + 1])
    known = ", ".join(str(increment.id) for increment in chain)
    raise NotFound(f"there is no increment {wanted}", hint=f"There are {known}.")
