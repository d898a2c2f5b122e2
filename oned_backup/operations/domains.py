"""What the hypervisor says about a VM: asked, and brought into the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.result import document
from oned_backup.errors import DriverBug, NotFound
from oned_backup.model.host import Host
from oned_backup.model.vm import DomainState, Vm, sync_domain
from oned_backup.operations.caller import Caller
from oned_backup.operations.services import Services


@dataclass(frozen=True)
class DomainView:
    """A domain as it is now; `capacity_bytes`: the virtual size of each disk, by target."""

    xml: xmldoc.Element
    state: DomainState
    capacity_bytes: dict[str, int]


@dataclass(frozen=True)
class DomainSummary:
    """A line of what `monitor` tells of a host."""

    name: str
    uuid: str
    state: DomainState


def look_up_domain(caller: Caller, host: Host, name_or_uuid: str) -> DomainView:
    """The domain; `NotFound` if the host positively has none of that name or UUID."""
    answer = caller.vmm("dump_xml", host, options={"DOMAIN": name_or_uuid})
    return DomainView(
        xml=document(answer, "DOMAIN"),
        state=_state(answer["STATE"]),
        capacity_bytes=_capacities(answer.get("CAPACITY", "")),
    )


def look_up_domains(caller: Caller, host: Host, uuids: Sequence[str]) -> dict[str, DomainView]:
    """These domains by UUID, without those that the host has no more; one call if its driver can do that."""
    if not caller.services.driver(Kind.VMM, host.vm_mad).supports("dump_domains"):
        found = {}
        for uuid in uuids:
            with suppress(NotFound):
                found[uuid] = look_up_domain(caller, host, uuid)
        return found
    answer = document(caller.vmm("dump_domains", host, options={"DOMAINS": ",".join(uuids)}), "DOMAINS")
    return {xmldoc.text(entry, "UUID"): _view(entry) for entry in answer.iterfind("DOMAIN")}


def _view(entry: xmldoc.Element) -> DomainView:
    xml = entry.find("domain")
    if xml is None:
        raise DriverBug("DOMAINS: an entry without a domain")
    return DomainView(
        xml=xml,
        state=_state(xmldoc.text(entry, "STATE")),
        capacity_bytes=_capacities(xmldoc.text(entry, "CAPACITY")),
    )


def list_domains(caller: Caller, host: Host) -> tuple[DomainSummary, ...]:
    """All domains of the host."""
    answer = document(caller.vmm("monitor", host), "DOMAINS")
    return tuple(
        DomainSummary(
            name=entry.findtext("NAME", ""),
            uuid=xmldoc.text(entry, "UUID"),
            state=_state(xmldoc.text(entry, "STATE")),
        )
        for entry in answer.iterfind("DOMAIN")
    )


def refresh_vm(services: Services, caller: Caller, vm: Vm) -> tuple[Vm, DomainState]:
    """The VM with its document brought up to date from its host, and its domain's state."""
    view = look_up_domain(caller, services.host(vm.host_id), vm.uuid)
    now = int(services.clock())
    synced = services.store.change(
        "vm",
        vm.id,
        lambda element: sync_domain(Vm(element), view.xml, view.state, view.capacity_bytes, date=now).element,
    )
    return Vm(synced), view.state


def _state(text: str) -> DomainState:
    try:
        return DomainState(text)
    except ValueError as error:
        raise DriverBug(f"domain state '{text[:40]}' is none of {', '.join(DomainState)}") from error


def _capacities(text: str) -> dict[str, int]:
    """`vda:1073741824,vdb:1024` by target."""
    found = {}
    for entry in filter(None, text.split(",")):
        target, _, size = entry.rpartition(":")
        if not target or not size.isdecimal():
            raise DriverBug(f"CAPACITY: '{entry[:60]}' is not TARGET:BYTES")
        found[target] = int(size)
    return found
