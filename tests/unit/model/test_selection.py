from dataclasses import replace

import pytest

from oned_backup.contract.exports import Reason
from oned_backup.errors import InvalidInput
from oned_backup.model.backup_config import BackupConfig, Mode
from oned_backup.model.disk import Disk
from oned_backup.model.selection import Exclusion, configure, select, select_disks
from oned_backup.model.vm import with_config

PLAIN = Disk(0, "vda", "/a", "qcow2", "FILE")


@pytest.mark.parametrize(
    ("change", "config", "reason"),
    [
        ({}, {}, None),
        ({"type": "BLOCK"}, {}, None),
        ({"format": "raw"}, {}, None),
        ({"type": "CDROM"}, {}, "cdrom"),
        ({"type": "CDROM", "source": ""}, {"disk_ids": (0,)}, "cdrom"),
        ({"type": "RBD_CDROM"}, {}, "cdrom"),
        ({"type": "FLOPPY"}, {}, "floppy"),
        ({"type": "SWAP"}, {"backup_volatile": True}, "volatile"),
        ({"type": "FS"}, {}, "volatile"),
        ({"type": "FS"}, {"backup_volatile": True}, None),
        ({"type": "NETWORK"}, {}, "unsupported-source"),
        ({"type": "FILESYSTEM"}, {}, "unsupported-source"),
        ({"source": ""}, {}, "no-medium"),
        ({"read_only": True}, {}, "read-only"),
        ({}, {"disk_ids": (1, 2)}, "not-selected"),
        ({}, {"disk_ids": (0, 2)}, None),
        ({"type": "FS"}, {"backup_volatile": True, "disk_ids": (1,)}, "not-selected"),
    ],
)
def test_each_disk_is_in_or_out_for_one_reason(change, config, reason):
    included, excluded = select([replace(PLAIN, **change)], BackupConfig(**config))

    assert [disk.reason for disk in excluded] == ([reason] if reason else [])
    assert len(included) + len(excluded) == 1
    assert all(disk.text.startswith("vda ") for disk in excluded)


def test_reasons_are_those_of_the_driver_contract():
    assert {reason.value for reason in Exclusion} <= {reason.value for reason in Reason}


def test_a_selected_disk_that_has_gone_does_not_select_all_others(vm):
    vm = with_config(vm, replace(vm.config, disk_ids=(9,)))

    assert select_disks(vm)[0] == ()


def test_a_disk_that_is_not_there_or_cannot_be_backed_up_cannot_be_selected(vm):
    with pytest.raises(InvalidInput, match="VM 7 has no disk 5") as unknown:
        configure(vm, {"DISK_IDS": "0,5"})
    with pytest.raises(InvalidInput, match="disk 2 of VM 7 cannot be backed up: sda is a CD-ROM"):
        configure(vm, {"DISK_IDS": "0,2"})

    assert unknown.value.hint == "It has 0 (vda), 1 (vdb), 2 (sda)."


@pytest.fixture
def chained(vm):
    return with_config(vm, replace(vm.config, incremental_backup_id=3, last_increment_id=1))


def test_naming_all_disks_is_no_change_and_keeps_the_chain(chained):
    same = configure(chained, {"DISK_IDS": "0,1", "BACKUP_VOLATILE": "YES"})

    assert same.config.incremental_backup_id == 3
    assert same.config.disk_ids == (0, 1)


@pytest.mark.parametrize("values", [{"DISK_IDS": "1"}, {"MODE": "FULL"}])
def test_another_set_of_disks_or_mode_ends_the_chain(chained, values):
    assert configure(chained, values).config.incremental_backup_id == -1


def test_going_full_and_back_does_not_revive_the_chain(chained):
    back = configure(configure(chained, {"MODE": "FULL"}), {"MODE": "INCREMENT"})

    assert (back.config.mode, back.config.has_chain) == (Mode.INCREMENT, False)
