"""The HOST document: a hypervisor and the URI by which libvirt reaches it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from pathlib import PurePosixPath

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model.document import Document, checked_title, id_list, ids, replace_all, section, shown
from oned_backup.model.vm import Placement

DEFAULT_URI = "qemu:///system"

#: directories on a host that people may set, all absolute, and what is used otherwise
PATHS: Mapping[str, str] = {
    # on another machine: holds a directory for each daemon, so that none takes another's jobs for its own
    "REMOTE_DIR": "/run/oned-backup",
    # of libvirt's: the state of TPMs, by the UUIDs of their domains
    "SWTPM_DIR": "/var/lib/libvirt/swtpm",
}


class HostState(IntEnum):
    """STATE, as far as it is used here."""

    INIT = 0
    MONITORED = 2
    ERROR = 3
    DISABLED = 4


class Host(Document):
    """A host document. Its element must not be changed: use the functions of this module."""

    @property
    def uri(self) -> str:
        """Libvirt's URI."""
        return xmldoc.text(self.element, "TEMPLATE/URI", DEFAULT_URI)

    @property
    def vm_mad(self) -> str:
        """The hypervisor driver's name."""
        return xmldoc.text(self.element, "VM_MAD")

    @property
    def tm_mad(self) -> str:
        """The transfer manager driver for VMs that are imported from it."""
        return xmldoc.text(self.element, "TEMPLATE/TM_MAD", "qcow2")

    def path(self, name: str) -> PurePosixPath:
        """One of `PATHS` on this host."""
        return PurePosixPath(xmldoc.text(self.element, f"TEMPLATE/{name}") or PATHS[name])

    @property
    def state_name(self) -> str:
        """The state as people know it."""
        return {int(state): state.name for state in HostState}.get(self.state, f"STATE {self.state}")

    @property
    def error(self) -> str:
        """Why it could not be reached last."""
        return xmldoc.text(self.element, "TEMPLATE/ERROR")

    @property
    def vm_ids(self) -> tuple[int, ...]:
        """The imported VMs that live on it."""
        return ids(self.element, "VMS")

    @property
    def placement(self) -> Placement:
        """What a VM's document says about living here."""
        return Placement(self.id, self.name, self.vm_mad, self.tm_mad)


def new_host(
    host_id: int, *, name: str, uri: str = DEFAULT_URI, vm_mad: str = "kvm", tm_mad: str = "qcow2"
) -> Host:
    """The document of a host that nobody has reached yet."""
    element = xmldoc.build(
        "HOST",
        {
            "ID": host_id,
            "NAME": checked_title(name),
            "STATE": int(HostState.INIT),
            "PREV_STATE": int(HostState.INIT),
            "IM_MAD": vm_mad,
            "VM_MAD": vm_mad,
            "CLUSTER_ID": 0,
            "CLUSTER": "default",
            "HOST_SHARE": {
                "MEM_USAGE": 0,
                "CPU_USAGE": 0,
                "TOTAL_MEM": 0,
                "TOTAL_CPU": 0,
                "MAX_MEM": 0,
                "MAX_CPU": 0,
                "RUNNING_VMS": 0,
                "VMS_THREAD": 1,
                "DATASTORES": {"DISK_USAGE": 0, "FREE_DISK": 0, "MAX_DISK": 0, "USED_DISK": 0},
                "PCI_DEVICES": None,
                "NUMA_NODES": None,
            },
            "VMS": None,
            "TEMPLATE": {"TM_MAD": tm_mad, "URI": uri},
            "MONITORING": None,
        },
    )
    return Host(element)


def with_state(host: Host, state: HostState, error: str = "") -> Host:
    """`host` in that state; `error` says why it could not be reached."""
    element = xmldoc.copy(host.element)
    if host.state != state:
        xmldoc.put(element, "PREV_STATE", host.state)
        xmldoc.put(element, "STATE", int(state))
    errors = [xmldoc.build("ERROR", shown(error))] if error else []
    replace_all(section(element, "TEMPLATE"), "ERROR", errors)
    return Host(element)


def with_paths(host: Host, values: Mapping[str, str]) -> Host:
    """`host` with other `PATHS`; an empty value restores the default."""
    element = xmldoc.copy(host.element)
    for name, value in values.items():
        if name not in PATHS:
            raise InvalidInput(f"{name} cannot be set of a host", hint=f"What can: {', '.join(PATHS)}.")
        path = PurePosixPath(value)
        if value and (not path.is_absolute() or ".." in path.parts or not value.isprintable()):
            raise InvalidInput(f"{name} is {value!r}, not the absolute path of a directory")
        found = [xmldoc.build(name, value)] if value else []
        replace_all(section(element, "TEMPLATE"), name, found)
    return Host(element)


def with_vms(host: Host, vm_ids: Iterable[int]) -> Host:
    """`host` with further imported VMs."""
    return _with_ids(host, {*host.vm_ids, *vm_ids})


def without_vm(host: Host, vm_id: int) -> Host:
    """`host` without that VM."""
    return _with_ids(host, set(host.vm_ids) - {vm_id})


def _with_ids(host: Host, vm_ids: set[int]) -> Host:
    element = xmldoc.copy(host.element)
    xmldoc.put(element, "VMS", id_list(vm_ids))
    return Host(element)
