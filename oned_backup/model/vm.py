"""The VM document: what is known of a libvirt domain, in OpenNebula's form.

A `Vm` wraps the element and reads from it; the functions give new documents.
Elements that this version does not know are kept. Where OpenNebula's schema has
no place for something of ours it lies in USER_TEMPLATE/ONED_BACKUP, which the
schema leaves open: NEXT_DISK_ID, so that a disk's id is never given twice, and
the settings of backups that OpenNebula does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum

from oned_backup import xmldoc
from oned_backup.errors import Conflict, InvalidInput
from oned_backup.model.backup_config import OWN, BackupConfig, imported_config
from oned_backup.model.described_domain import described_domain, has_agent_channel
from oned_backup.model.disk import Disk, disk_from_element, disk_to_element, domain_disks, with_ids
from oned_backup.model.document import (
    ADMINISTRATOR,
    Document,
    Owner,
    add_id,
    fitting_title,
    id_list,
    identity,
    ids,
    permissions,
    replace_all,
    section,
    shown,
)


class VmState(IntEnum):
    """STATE, as far as it is used here."""

    ACTIVE = 3
    DONE = 6
    POWEROFF = 8


class LcmState(IntEnum):
    """LCM_STATE, as far as it is used here."""

    INIT = 0
    RUNNING = 3
    BACKUP = 69
    BACKUP_POWEROFF = 70
    RESTORE = 71


class DomainState(StrEnum):
    """A domain's state as the hypervisor driver tells it; all but OFF have a QEMU process."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    CRASHED = "CRASHED"
    OFF = "OFF"


class Vm(Document):
    """A VM document. Its element must not be changed: use the functions of this module."""

    @property
    def uuid(self) -> str:
        """The domain's UUID: what a driver finds it by."""
        return xmldoc.text(self.element, "TEMPLATE/OS/UUID")

    @property
    def deploy_id(self) -> str:
        """The domain's name on its hypervisor."""
        return self.element.findtext("DEPLOY_ID", "")

    @property
    def owner(self) -> Owner:
        """Whom the VM, and the backups made of it, belong to."""
        return Owner.of(self.element)

    @property
    def lcm_state(self) -> int:
        """LCM_STATE; see `LcmState`."""
        return xmldoc.integer(self.element, "LCM_STATE")

    @property
    def in_backup(self) -> bool:
        """Whether a backup of it is under way."""
        return self.lcm_state in {LcmState.BACKUP, LcmState.BACKUP_POWEROFF}

    @property
    def state_name(self) -> str:
        """The state as people know it, such as RUNNING, POWEROFF or BACKUP."""
        if self.state == VmState.ACTIVE:
            known = {int(state): state.name for state in LcmState}
            return known.get(self.lcm_state, f"LCM_STATE {self.lcm_state}")
        return {int(state): state.name for state in VmState}.get(self.state, f"STATE {self.state}")

    @property
    def host_id(self) -> int:
        """The hypervisor it was last seen on, -1 if it never was."""
        history = self._history()
        return -1 if history is None else xmldoc.integer(history, "HID", -1)

    @property
    def host_name(self) -> str:
        """That hypervisor's name."""
        history = self._history()
        return "" if history is None else history.findtext("HOSTNAME", "")

    @property
    def vm_mad(self) -> str:
        """The hypervisor driver's name."""
        history = self._history()
        return "" if history is None else xmldoc.text(history, "VM_MAD")

    @property
    def tm_mad(self) -> str:
        """The transfer manager driver's name."""
        history = self._history()
        return xmldoc.text(self.element if history is None else history, "TM_MAD")

    @property
    def disks(self) -> tuple[Disk, ...]:
        """All disks, in order of their ids."""
        found = (disk_from_element(disk) for disk in self.element.iterfind("TEMPLATE/DISK"))
        return tuple(sorted(found, key=lambda disk: disk.disk_id))

    @property
    def next_disk_id(self) -> int:
        """The id that the next new disk is given."""
        highest = max((disk.disk_id for disk in self.disks), default=-1)
        return max(xmldoc.integer(self.element, "USER_TEMPLATE/ONED_BACKUP/NEXT_DISK_ID", 0), highest + 1)

    @property
    def config(self) -> BackupConfig:
        """How it is backed up."""
        own = self.element.iterfind("USER_TEMPLATE/ONED_BACKUP/*")
        return BackupConfig.from_element(self.element.find("BACKUPS/BACKUP_CONFIG"), own)

    @property
    def backup_ids(self) -> tuple[int, ...]:
        """The ids of its backup images, oldest first."""
        return ids(self.element, "BACKUPS/BACKUP_IDS")

    @property
    def error(self) -> str:
        """Why the last operation on it failed, empty if it did not."""
        return xmldoc.text(self.element, "USER_TEMPLATE/ERROR")

    def _history(self) -> xmldoc.Element | None:
        records = self.element.findall("HISTORY_RECORDS/HISTORY")
        return records[-1] if records else None


@dataclass(frozen=True)
class Placement:
    """Where a VM lives: its host, and the drivers that reach it and its disks there."""

    host_id: int
    host_name: str
    vm_mad: str = "kvm"
    tm_mad: str = "qcow2"


def new_vm(
    vm_id: int,
    *,
    name: str,
    placement: Placement,
    domain: xmldoc.Element,
    state: DomainState,
    capacity_bytes: Mapping[str, int],
    date: int,
    owner: Owner = ADMINISTRATOR,
    config: BackupConfig | None = None,
) -> Vm:
    """The document of a domain that is imported at `date` (seconds since 1970).

    `config` absent: `backup_config.imported_config` for this domain.
    """
    if config is None:
        config = imported_config(has_agent_channel=has_agent_channel(domain))
    element = xmldoc.build(
        "VM",
        {
            **identity(vm_id, name, owner),
            "PERMISSIONS": permissions(),
            "LAST_POLL": date,
            "STATE": int(VmState.POWEROFF),
            "LCM_STATE": int(LcmState.INIT),
            "PREV_STATE": int(VmState.POWEROFF),
            "PREV_LCM_STATE": int(LcmState.INIT),
            "RESCHED": 0,
            "STIME": date,
            "ETIME": 0,
            "DEPLOY_ID": name,
            "MONITORING": None,
            "SCHED_ACTIONS": None,
            "TEMPLATE": {"TM_MAD_SYSTEM": placement.tm_mad, "VMID": vm_id},
            "USER_TEMPLATE": None,
            "HISTORY_RECORDS": {"HISTORY": _history(vm_id, placement, date, owner)},
            "BACKUPS": {"BACKUP_CONFIG": None, "BACKUP_IDS": None},
        },
    )
    return sync_domain(with_config(Vm(element), config), domain, state, capacity_bytes, date=date)


def sync_domain(
    vm: Vm, domain: xmldoc.Element, state: DomainState, capacity_bytes: Mapping[str, int], *, date: int
) -> Vm:
    """`vm` as `domain` (libvirt's XML) is at `date`; `capacity_bytes`: virtual sizes by target.

    Disks keep their ids (see `disk.with_ids`) and their last known size where
    `capacity_bytes` has none. The VM's name follows a rename on the hypervisor
    unless it was given another name here. During a backup its state stays.
    """
    element = xmldoc.copy(vm.element)
    domain_name = domain.findtext("name", "").strip()
    if not domain_name:
        raise InvalidInput("domain XML has no name")
    if vm.name == fitting_title(vm.deploy_id) and domain_name != vm.deploy_id:
        xmldoc.put(element, "NAME", fitting_title(domain_name))
    xmldoc.put(element, "DEPLOY_ID", domain_name)
    xmldoc.put(element, "LAST_POLL", date)
    template = section(element, "TEMPLATE")
    known = {disk.disk_id: disk for disk in vm.disks}
    old = {xmldoc.integer(disk, "DISK_ID"): disk for disk in template.findall("DISK")}
    disks, next_id = with_ids(domain_disks(domain, capacity_bytes), known.values(), vm.next_disk_id)
    children = []
    for disk in disks:
        before = known.get(disk.disk_id)
        size_mb = disk.size_mb or (before.size_mb if before else 0)
        children.append(disk_to_element(replace(disk, size_mb=size_mb), old.get(disk.disk_id)))
    replace_all(template, "DISK", children)
    for tag, elements in described_domain(domain, template).items():
        replace_all(template, tag, elements)
    ours = section(section(element, "USER_TEMPLATE"), "ONED_BACKUP")
    xmldoc.put(ours, "NEXT_DISK_ID", next_id)
    synced = Vm(element)
    return synced if vm.in_backup else with_power(synced, state)


def with_placement(vm: Vm, placement: Placement, *, date: int) -> Vm:
    """`vm` on another host since `date`; the hosts before stay in its history."""
    element = xmldoc.copy(vm.element)
    records = section(element, "HISTORY_RECORDS")
    history = xmldoc.build("HISTORY", _history(vm.id, placement, date, vm.owner))
    xmldoc.put(history, "SEQ", len(records.findall("HISTORY")))
    records.append(history)
    xmldoc.put(section(element, "TEMPLATE"), "TM_MAD_SYSTEM", placement.tm_mad)
    return Vm(element)


def with_power(vm: Vm, state: DomainState) -> Vm:
    """`vm` running or powered off, as the hypervisor says."""
    if state is DomainState.OFF:
        return with_state(vm, VmState.POWEROFF, LcmState.INIT)
    return with_state(vm, VmState.ACTIVE, LcmState.RUNNING)


def with_state(vm: Vm, state: int, lcm_state: int) -> Vm:
    """`vm` in that state; the one it leaves becomes PREV_STATE and PREV_LCM_STATE."""
    if (vm.state, vm.lcm_state) == (state, lcm_state):
        return vm
    element = xmldoc.copy(vm.element)
    xmldoc.put(element, "PREV_STATE", vm.state)
    xmldoc.put(element, "PREV_LCM_STATE", vm.lcm_state)
    xmldoc.put(element, "STATE", int(state))
    xmldoc.put(element, "LCM_STATE", int(lcm_state))
    return Vm(element)


def backup_begun(vm: Vm) -> Vm:
    """`vm` in BACKUP, or BACKUP_POWEROFF if it is off; `Conflict` in any other state."""
    if (vm.state, vm.lcm_state) == (VmState.ACTIVE, LcmState.RUNNING):
        return with_state(vm, VmState.ACTIVE, LcmState.BACKUP)
    if vm.state == VmState.POWEROFF:
        return with_state(vm, VmState.ACTIVE, LcmState.BACKUP_POWEROFF)
    raise Conflict(f"could not create a new backup for VM {vm.id}, wrong state {vm.state_name}")


def backup_ended(vm: Vm) -> Vm:
    """`vm` back in the state it had before the backup; unchanged if none was under way."""
    if vm.lcm_state == LcmState.BACKUP:
        return with_power(vm, DomainState.RUNNING)
    if vm.lcm_state == LcmState.BACKUP_POWEROFF:
        return with_power(vm, DomainState.OFF)
    return vm


def with_config(vm: Vm, config: BackupConfig) -> Vm:
    """`vm` with that BACKUP_CONFIG, unchecked; for a user's values see `selection.configure`."""
    element = xmldoc.copy(vm.element)
    replace_all(section(element, "BACKUPS"), "BACKUP_CONFIG", [config.to_element()])
    own = config.to_own_elements()
    if own or element.find("USER_TEMPLATE/ONED_BACKUP") is not None:
        ours = section(section(element, "USER_TEMPLATE"), "ONED_BACKUP")
        for name in sorted(OWN):
            replace_all(ours, name, [child for child in own if child.tag == name])
    return Vm(element)


def with_backup(vm: Vm, image_id: int) -> Vm:
    """`vm` with a further backup image."""
    element = xmldoc.copy(vm.element)
    add_id(section(element, "BACKUPS"), "BACKUP_IDS", image_id)
    return Vm(element)


def without_backup(vm: Vm, image_id: int) -> Vm:
    """`vm` without that image; if it held the active chain, the next backup starts a new one."""
    element = xmldoc.copy(vm.element)
    xmldoc.put(section(element, "BACKUPS"), "BACKUP_IDS", id_list(set(vm.backup_ids) - {image_id}))
    left = Vm(element)
    if left.config.incremental_backup_id == image_id:
        return with_config(left, left.config.without_chain())
    return left


def with_error(vm: Vm, text: str, when: str) -> Vm:
    """`vm` with USER_TEMPLATE/ERROR telling what went wrong and `when` (a readable time)."""
    element = xmldoc.copy(vm.element)
    xmldoc.put(section(element, "USER_TEMPLATE"), "ERROR", f"{when}: {shown(text)}")
    return Vm(element)


def without_error(vm: Vm) -> Vm:
    """`vm` without USER_TEMPLATE/ERROR."""
    if not vm.error:
        return vm
    element = xmldoc.copy(vm.element)
    replace_all(section(element, "USER_TEMPLATE"), "ERROR", [])
    return Vm(element)


def _history(vm_id: int, placement: Placement, date: int, owner: Owner) -> dict[str, xmldoc.Content]:
    return {
        "OID": vm_id,
        "SEQ": 0,
        "HOSTNAME": placement.host_name,
        "HID": placement.host_id,
        "CID": -1,
        "STIME": date,
        "ETIME": 0,
        "VM_MAD": placement.vm_mad,
        "TM_MAD": placement.tm_mad,
        "DS_ID": -1,
        "PLAN_ID": -1,
        "ACTION_ID": -1,
        "PSTIME": 0,
        "PETIME": 0,
        "RSTIME": date,
        "RETIME": 0,
        "ESTIME": 0,
        "EETIME": 0,
        "ACTION": 0,
        "UID": owner.uid,
        "GID": owner.gid,
        "REQUEST_ID": "",
    }
