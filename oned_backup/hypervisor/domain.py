"""A libvirt domain: its state, its XML, its disks with their backing chains."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import libvirt

from oned_backup import xmldoc
from oned_backup.errors import NotFound
from oned_backup.hypervisor.connection import libvirt_errors

_SOURCE_ATTRIBUTE = {"file": "file", "block": "dev", "network": "name", "dir": "dir", "volume": "volume"}
_SPECIAL = (("encryption", "is encrypted"), ("slices", "is a part of a file"))


class State(StrEnum):
    """What a domain does, as far as backups care."""

    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    OFF = "OFF"
    CRASHED = "CRASHED"


_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: State.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: State.RUNNING,
    libvirt.VIR_DOMAIN_SHUTDOWN: State.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: State.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: State.PAUSED,
    libvirt.VIR_DOMAIN_CRASHED: State.CRASHED,
}


@dataclass(frozen=True)
class DomainDisk:
    """A disk as libvirt has it. `backing`: the files below the top one, empty where not known.

    `backing_ends`: there are no others below, whatever the images say. `special`: what of it only
    libvirt knows how to open. `shareable`: other domains may have it, too.
    """

    target: str
    type: str
    device: str
    format: str
    source: str
    backing: tuple[str, ...] = ()
    backing_ends: bool = False
    special: str = ""
    shareable: bool = False
    only_off: str = ""


class Domain:
    """One domain. Whether it is active can change between any two calls."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.name: str = handle.name()
        self.uuid: str = handle.UUIDString()

    @property
    def is_active(self) -> bool:
        """Whether a QEMU process runs it."""
        with libvirt_errors(f"domain {self.name}"):
            return bool(self.handle.isActive())

    @property
    def state(self) -> State:
        """What it does now; without a QEMU process it is OFF."""
        with libvirt_errors(f"domain {self.name}"):
            state, _ = self.handle.state()
            if state in _STATES and (self.handle.isActive() or _STATES[state] is State.CRASHED):
                return _STATES[state]
            return State.OFF

    def xml(self) -> xmldoc.Element:
        """The XML of what is: the live one of an active domain."""
        with libvirt_errors(f"XML of domain {self.name}"):
            return xmldoc.parse(self.handle.XMLDesc(0), what=f"XML of domain {self.name}")

    def inactive_xml(self) -> str:
        """The definition for the next start, with security information."""
        flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
        with libvirt_errors(f"XML of domain {self.name}"):
            return str(self.handle.XMLDesc(flags))

    def capacity_bytes(self, target: str) -> int:
        """Virtual size of a disk of an active domain."""
        with libvirt_errors(f"disk {target} of domain {self.name}"):
            return int(self.handle.blockInfo(target)[0])


def find_domain(connection: Any, uuid: str, name: str) -> Domain:
    """The domain with that UUID, or where none is known, with that name; `NotFound` if there is none.

    A domain with another UUID is another machine, though it may have taken over the name.
    """
    lookup, key = (connection.lookupByUUIDString, uuid) if uuid else (connection.lookupByName, name)
    try:
        with libvirt_errors(f"domain {key}"):
            return Domain(lookup(key))
    except NotFound as error:
        raise NotFound(f"domain {name or uuid} is not defined on the host") from error


def others_with(domain: Domain, source: str) -> list[str]:
    """The names of the other domains that run on the same host with a disk of that source."""
    with libvirt_errors("list of domains"):
        handles = domain.handle.connect().listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
    found = []
    for other in map(Domain, handles):
        with contextlib.suppress(NotFound):  # it has ended since
            if other.uuid != domain.uuid and source in {disk.source for disk in disks(other.xml())}:
                found.append(other.name)
    return found


def disks(xml: xmldoc.Element) -> tuple[DomainDisk, ...]:
    """All disks in a domain's XML, in its order."""
    return tuple(_disk(element) for element in xml.iterfind("devices/disk"))


def has_iothreads(xml: xmldoc.Element) -> bool:
    """Whether a thread of its own serves one of the domain's disks, or a controller that has disks."""
    return any(
        driver.get("iothread") is not None or driver.find("iothreads") is not None
        for driver in xml.iterfind("devices/*/driver")
    )


def qemu_uid(xml: xmldoc.Element) -> int:
    """The user that QEMU runs as, from an active domain's XML; ours where libvirt does not say."""
    for label in xml.iterfind("seclabel"):
        if label.get("model") == "dac":
            user = xmldoc.text(label, "label").partition(":")[0].lstrip("+")
            if user.isdecimal():
                return int(user)
    return os.geteuid()


def nvram_path(xml: xmldoc.Element) -> str:
    """The file with the domain's UEFI variables; empty if it has none, or not yet."""
    source = xml.find("os/nvram/source")
    if source is not None:
        return source.get("file", "")
    return xmldoc.text(xml, "os/nvram")


def tpm(xml: xmldoc.Element) -> xmldoc.Element | None:
    """The domain's emulated TPM, whose state is kept on the host; None if it has none."""
    return xml.find("devices/tpm/backend[@type='emulator']")


def _disk(element: xmldoc.Element) -> DomainDisk:
    target = element.find("target")
    driver = element.find("driver")
    backing = []
    ends = False
    layer = element.find("backingStore")
    while layer is not None:
        source = _source(layer)
        if source:
            backing.append(source)
        ends = not source
        layer = layer.find("backingStore")
    return DomainDisk(
        target="" if target is None else target.get("dev", ""),
        type=element.get("type", "file"),
        device=element.get("device", "disk"),
        format="raw" if driver is None else driver.get("type", "raw"),
        source=_source(element),
        backing=tuple(backing),
        backing_ends=ends,
        special=next((text for tag, text in _SPECIAL if element.find(f".//{tag}") is not None), ""),
        shareable=element.find("shareable") is not None,
        only_off=_only_off(element),
    )


def _only_off(element: xmldoc.Element) -> str:
    if element.get("device") == "lun" and element.find("target[@bus='scsi']") is not None:
        return "is a SCSI device that is passed through"  # QEMU does not see what the guest writes
    return "is transient" if element.find("transient") is not None else ""


def _source(element: xmldoc.Element) -> str:
    source = element.find("source")
    if source is None:
        return ""
    return source.get(_SOURCE_ATTRIBUTE.get(element.get("type", "file"), "file"), "")
