"""tm/qcow2 on a running guest: every restore point is exactly what QEMU saw at that instant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from backed_up_vm import BackedUpVm, new_file
from lab import Guest, cdrom, data_disk, root_disk

pytestmark = pytest.mark.guest

BackUp = Callable[[Guest], BackedUpVm]


def test_full_and_increments_of_two_disks_while_the_guest_writes_and_trims(
    make_guest: Callable[..., Guest], back_up: BackUp, tmp_path: Path
) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64), cdrom()])
    vm = back_up(guest)
    new_file(guest, "/data/vdb/a", 8)

    full = vm.backup(meanwhile=lambda: new_file(guest, "/data/vdb/b", 4))
    assert {disk.type.value for disk in full.exports.disks} == {"FULL"}
    assert full.reason("vda") == full.reason("vdb") == "first-backup"
    assert full.excluded() == {"hdc": "cdrom"}
    assert full.exports.increment_id == 0
    for target in ("vda", "vdb"):
        vm.assert_restores(target)

    for round_ in range(2):
        guest.shell(f"rm /data/vdb/a; fstrim /data/vdb; echo {round_} >/root/x; sync")
        new_file(guest, "/data/vdb/a", 3)
        point = vm.backup(
            meanwhile=lambda: guest.shell("rm /data/vdb/a; fstrim -v /data/vdb; touch /data/vdb/a")
        )
        assert point.reason("vda") == point.reason("vdb") == "increment"
        assert point.exports.increment_id == round_ + 1
        for target in ("vda", "vdb"):
            vm.assert_restores(target)
    assert vm.checkpoints() == [point.exports.checkpoint]
