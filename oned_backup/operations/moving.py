"""A VM that lives on another host than the catalogue says: found by its UUID, and moved in the catalogue.

Hosts are asked only if the VM's own one has no such domain, cannot be reached, or has
it switched off: after a migration the definition often stays behind, with a disk
that nobody writes to any more. What is not running elsewhere has moved only if its own host
positively has it no more.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

from oned_backup.errors import NotFound, OnedBackupError, Unavailable
from oned_backup.model.host import Host, HostState, with_vms, without_vm
from oned_backup.model.vm import DomainState, Vm, with_placement
from oned_backup.operations.caller import Caller
from oned_backup.operations.domains import list_domains, refresh_vm
from oned_backup.operations.services import Services

logger = logging.getLogger(__name__)

_ACTIVE = frozenset({DomainState.RUNNING, DomainState.PAUSED})


def new_home(services: Services, caller: Caller, vm: Vm, *, only_active: bool) -> Host | None:
    """The other host that has the VM's domain now; None if none has.

    `only_active`: a domain that is defined there but does not run does not count.
    """
    others = [
        host
        for host in (Host(entry.element) for entry in services.store.find("host"))
        if host.id != vm.host_id and host.state != HostState.DISABLED
    ]
    if not others or not vm.uuid:
        return None
    with ThreadPoolExecutor(len(others)) as pool:
        states = list(pool.map(lambda host: _state_on(caller, host, vm.uuid), others))
    found = [
        host
        for host, state in zip(others, states, strict=True)
        if state in _ACTIVE or (state is not None and not only_active)
    ]
    running = [host for host, state in zip(others, states, strict=True) if state in _ACTIVE]
    return next(iter([*running, *found]), None)


def _state_on(caller: Caller, host: Host, uuid: str) -> DomainState | None:
    """The state of the domain on that host; None if it is not there, or the host does not say."""
    try:
        domains = list_domains(caller, host)
    except OnedBackupError as error:
        logger.info("host %s was not asked for %s: %s", host.name, uuid, error)
        return None
    return next((domain.state for domain in domains if domain.uuid == uuid), None)


def move(services: Services, vm_id: int, home: Host) -> Vm:
    """The VM with its new home in the catalogue; backups, configuration and disk ids stay."""
    date = int(services.clock())
    with services.store.transaction() as tx:
        for entry in tx.find("host"):
            if vm_id in Host(entry.element).vm_ids:
                tx.change(
                    "host",
                    Host(entry.element).id,
                    lambda element: without_vm(Host(element), vm_id).element,
                )
        tx.change("host", home.id, lambda element: with_vms(Host(element), [vm_id]).element)
        moved = tx.change(
            "vm",
            vm_id,
            lambda element: with_placement(Vm(element), home.placement, date=date).element,
        )
    return Vm(moved)


def refreshed(services: Services, caller: Caller, before: Vm) -> tuple[Vm, DomainState, str]:
    """As `domains.refresh_vm`, wherever the VM lives by now; what is to be told of its move, if it moved."""
    trouble: OnedBackupError | None = None
    try:
        vm, state = refresh_vm(services, caller, before)
        if state is not DomainState.OFF:
            return vm, state, ""
    except (NotFound, Unavailable) as error:
        trouble = error
    home = new_home(services, caller, before, only_active=not isinstance(trouble, NotFound))
    if home is None:
        if isinstance(trouble, NotFound):
            raise NotFound(
                f"VM {before.id} ({before.name}) is gone: {trouble.message}, nor on any other that is known",
                hint=f"`oned-backup vm forget {before.id}` if that is so; its backups stay.",
            ) from trouble
        if trouble is not None:
            raise trouble
        return vm, state, ""
    vm, state = refresh_vm(services, caller, move(services, before.id, home))
    return vm, state, f"the VM has moved from host {before.host_name} to {home.name}"
