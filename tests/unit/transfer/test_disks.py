"""Which disks of a domain are backed up, as far as only libvirt knows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from oned_backup import xmldoc
from oned_backup.hypervisor.domain import disks
from oned_backup.model.backup_config import BackupConfig
from oned_backup.model.host import new_host
from oned_backup.model.vm import DomainState, new_vm
from oned_backup.transfer.disks import select

DISK = "<disk type='{}' device='{}'><source {}='{}'/><target dev='{}' bus='{}'/></disk>"
DOMAIN = xmldoc.parse(
    "<domain><name>web</name><uuid>5809c72c-be8a-4aa5-a68e-e4181cbc0a70</uuid><devices>"
    + DISK.format("file", "disk", "file", "/vm/one", "vda", "virtio")
    + DISK.format("block", "lun", "dev", "/dev/sdx", "sda", "scsi")
    + DISK.format("block", "lun", "dev", "/dev/sdy", "vdb", "virtio")
    + DISK.format("file", "disk", "file", "/vm/two", "vdc", "virtio").replace(
        "</disk>", "<transient/></disk>"
    )
    + "</devices></domain>"
)


@pytest.mark.parametrize(("running", "excluded"), [(True, ["sda", "vdc"]), (False, [])])
def test_what_can_be_in_no_backup_job(running: bool, excluded: list[str]) -> None:
    """QEMU's scsi-block hands writes to the device past any job; libvirt makes none with transient disks."""
    lab = new_host(0, name="lab", uri="qemu:///system")
    vm = new_vm(
        7,
        name="web",
        placement=lab.placement,
        domain=DOMAIN,
        state=DomainState.RUNNING,
        capacity_bytes={},
        date=0,
        config=BackupConfig(backup_volatile=True),
    )
    task: Any = SimpleNamespace(vm=vm)
    selection = select(task, disks(DOMAIN), running=running)
    assert [disk.target for disk in selection.excluded] == excluded
    assert all("only while the domain is off" in disk.text for disk in selection.excluded)
