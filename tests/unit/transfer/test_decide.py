"""The rule by which a disk continues its chain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oned_backup.contract.exports import DiskExport, Exports, Reason
from oned_backup.model.increments import BackupType
from oned_backup.transfer.decide import Current, Tracking, decide, is_same_disk

BEFORE = DiskExport(
    disk_id=0,
    target="vda",
    file="disk.0.0",
    type=BackupType.FULL,
    reason=Reason.FIRST_BACKUP,
    size_bytes=1 << 30,
    format="qcow2",
    source="/vm/a.qcow2",
    source_id="2049:17",
    backing=("/vm/template.qcow2",),
)
NOW = Current(0, "vda", "/vm/a.qcow2", "2049:17", ("/vm/template.qcow2",), "qcow2", 1 << 30)
PARENT = Exports(disks=(BEFORE,), checkpoint="odb-0badcafe-x")


@pytest.mark.parametrize(
    ("now", "tracking", "reason"),
    [
        (NOW, Tracking.USABLE, Reason.INCREMENT),
        (replace(NOW, size_bytes=2 << 30), Tracking.USABLE, Reason.INCREMENT),
        (replace(NOW, target="vdb"), Tracking.USABLE, Reason.INCREMENT),
        (NOW, Tracking.MISSING, Reason.BITMAP_MISSING),
        (NOW, Tracking.INCONSISTENT, Reason.BITMAP_INCONSISTENT),
        (NOW, Tracking.DISABLED, Reason.BITMAP_INCONSISTENT),
        (replace(NOW, disk_id=1), Tracking.USABLE, Reason.NEW_DISK),
        (replace(NOW, source="/vm/b.qcow2"), Tracking.USABLE, Reason.DISK_REPLACED),
        (replace(NOW, source_id="2049:18"), Tracking.USABLE, Reason.DISK_REPLACED),
        (replace(NOW, size_bytes=1 << 20), Tracking.USABLE, Reason.DISK_SHRUNK),
        (
            replace(NOW, untracked="raw keeps no dirty bitmaps"),
            Tracking.USABLE,
            Reason.NO_CHANGE_TRACKING,
        ),
    ],
)
def test_each_reason(now: Current, tracking: Tracking, reason: Reason) -> None:
    decision = decide(now, PARENT, tracking, Reason.RESET)
    assert decision.reason is reason
    increment = reason is Reason.INCREMENT
    assert decision.type is (BackupType.INCREMENT if increment else BackupType.FULL)
    assert bool(decision.text) is not increment


@pytest.mark.parametrize("reason", [Reason.FIRST_BACKUP, Reason.RESET, Reason.FULL_MODE])
def test_without_a_parent_the_callers_reason_counts(reason: Reason) -> None:
    assert decide(NOW, None, Tracking.USABLE, reason).reason is reason


def test_parent_that_made_no_checkpoint() -> None:
    parent = replace(PARENT, checkpoint="")
    assert decide(NOW, parent, Tracking.USABLE, Reason.RESET).reason is Reason.BITMAP_MISSING


@pytest.mark.parametrize(
    ("now", "same"),
    [
        (replace(NOW, source_id="64768:17"), True),  # another device number after a reboot
        (replace(NOW, source="/vm/overlay", source_id="1:1", backing=("/vm/a.qcow2",)), True),
        (replace(NOW, source="/vm/overlay", source_id="1:1", backing=("/vm/a.qcow2", "/vm/t")), False),
        (replace(NOW, backing=()), True),  # an image in the middle was committed
        (replace(NOW, backing=("/vm/other.qcow2",)), False),  # rebased
        (replace(NOW, backing=("nbd://template",)), True),  # named otherwise by QEMU's tools
        (replace(NOW, source="/vm/template.qcow2", source_id="1:1", backing=("/vm/t",)), False),
        (replace(NOW, source="/vm/template.qcow2", source_id="1:1", backing=()), True),  # committed
        (replace(NOW, source="/vm/overlay", source_id="1:1", backing=("/vm/template.qcow2",)), False),
        (replace(NOW, source="/copy/a.qcow2", source_id="9:9@hv2", backing=()), True),  # moved: see below
    ],
)
def test_the_same_disk(now: Current, same: bool) -> None:
    assert is_same_disk(BEFORE, now) is same


def test_on_another_host_the_bitmap_has_the_last_word() -> None:
    parent = replace(PARENT, disks=(replace(BEFORE, source_id="1:17@fe80::1"),))
    moved = replace(NOW, source="/copy/a.qcow2", source_id="9:9@hv2", backing=())
    assert decide(moved, parent, Tracking.USABLE, Reason.RESET).reason is Reason.INCREMENT
    assert decide(moved, parent, Tracking.MISSING, Reason.RESET).reason is Reason.BITMAP_MISSING
    replaced = replace(NOW, source_id="1:18@fe80::1")
    assert decide(replaced, parent, Tracking.USABLE, Reason.RESET).reason is Reason.DISK_REPLACED
