"""Whether a disk continues its chain or starts a new one: the rule, without any effect.

An increment is sound only if the bitmap since the parent's checkpoint has seen
every write to what is now the disk. So the disk must be the parent's (or an
overlay on it, or what an overlay of it was committed into: libvirt carries the
bitmaps along), QEMU must vouch for the bitmap, and the disk must not have
shrunk. Each disk is judged by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from oned_backup.contract.exports import DiskExport, Exports, Reason
from oned_backup.model.increments import BackupType

#: the only format that keeps dirty bitmaps
TRACKED_FORMAT = "qcow2"


class Tracking(StrEnum):
    """What was found of the bitmap since the parent's checkpoint."""

    USABLE = "usable"
    MISSING = "missing"
    INCONSISTENT = "inconsistent"
    DISABLED = "disabled"


@dataclass(frozen=True)
class Current:
    """A disk as it is now. `source_id` is `device:inode[@machine]`; `backing` the files below it.

    `untracked`: why its image can keep no dirty bitmaps; empty: it can.
    """

    disk_id: int
    target: str
    source: str
    source_id: str
    backing: tuple[str, ...]
    format: str
    size_bytes: int
    untracked: str = ""


@dataclass(frozen=True)
class Decision:
    """FULL or INCREMENT, and why; `text` explains a fall-back to a person."""

    type: BackupType
    reason: Reason
    text: str = ""


INCREMENT = Decision(BackupType.INCREMENT, Reason.INCREMENT)


def decide(disk: Current, parent: Exports | None, tracking: Tracking, full_reason: Reason) -> Decision:
    """How to back up `disk`; `full_reason` is why there is no parent, if there is none."""
    if parent is None:
        return _full(full_reason)
    if disk.untracked:
        return _full(Reason.NO_CHANGE_TRACKING, disk.untracked)
    before = next((old for old in parent.disks if old.disk_id == disk.disk_id), None)
    return _of_another_disk(before, disk) or _untracked(disk, parent.checkpoint, tracking) or INCREMENT


def _of_another_disk(before: DiskExport | None, disk: Current) -> Decision | None:
    if before is None:
        return _full(Reason.NEW_DISK, f"{disk.target} is not in the parent backup")
    if not is_same_disk(before, disk):
        was, now = (" on ".join((image.source, *image.backing)) for image in (before, disk))
        return _full(Reason.DISK_REPLACED, f"{disk.target} was {was}, is {now}")
    if disk.size_bytes < before.size_bytes:
        return _full(
            Reason.DISK_SHRUNK, f"{disk.target} had {before.size_bytes} bytes, has {disk.size_bytes}"
        )
    return None


def _untracked(disk: Current, checkpoint: str, tracking: Tracking) -> Decision | None:
    if not checkpoint:
        return _full(Reason.BITMAP_MISSING, "the parent backup made no checkpoint")
    if tracking is Tracking.INCONSISTENT:
        text = f"bitmap {checkpoint} of {disk.target} was not closed: QEMU did not end in good order"
        return _full(Reason.BITMAP_INCONSISTENT, text)
    if tracking is Tracking.DISABLED:
        text = f"bitmap {checkpoint} of {disk.target} was switched off: it has not seen every write"
        return _full(Reason.BITMAP_INCONSISTENT, text)
    if tracking is Tracking.MISSING:
        return _full(Reason.BITMAP_MISSING, f"{disk.target} has no bitmap {checkpoint}")
    return None


def is_same_disk(before: DiskExport, now: Current) -> bool:
    """Whether `now` is the parent's disk, an overlay on it, or what an overlay of it was committed into.

    The device number in the ids is not compared: for network file systems and
    device mapper it is another one after a reboot. If the domain has moved to another host,
    its bitmap has the last word: it has the parent's name, and only that image or a copy of
    it has one of that name, with the data that belongs to it. A file that has come in below the
    parent's disk has content that no bitmap has seen; that some have gone, QEMU sees to.
    """
    if _machine(before.source_id) != _machine(now.source_id):
        return True
    if before.source == now.source:
        below = now.backing
        is_known = _inode(before.source_id) == _inode(now.source_id)
    elif before.source in now.backing:
        below = now.backing[now.backing.index(before.source) + 1 :]
        is_known = True
    else:
        below = now.backing
        is_known = now.source in before.backing
    # what is no file is named in one way by libvirt and in another by QEMU's tools
    return is_known and {path for path in below if path.startswith("/")} <= set(before.backing)


def refused(text: str) -> Decision:
    """The full that is taken because libvirt does not accept the bitmap after all."""
    return _full(Reason.CHECKPOINT_INVALID, text)


def changed_unseen(disk: Current, offset: int) -> Decision:
    """The full that is taken because the bitmap has not seen a write."""
    text = f"the cluster at {offset} of {disk.target} has changed, and its bitmap has not seen it"
    return _full(Reason.CHANGED_UNSEEN, text)


def _full(reason: Reason, text: str = "") -> Decision:
    return Decision(BackupType.FULL, reason, text)


def _machine(source_id: str) -> str:
    """The host of a file, as its id has it: `device:inode@machine`; empty for the daemon's own."""
    return source_id.partition("@")[2]


def _inode(source_id: str) -> str:
    return source_id.partition("@")[0].rpartition(":")[2]
