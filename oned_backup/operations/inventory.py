"""What is done at once, without an operation: hosts enter and leave, VMs are imported and configured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.errors import Conflict, InvalidInput, NotFound, OnedBackupError, Unavailable
from oned_backup.model.backup_config import RETENTION
from oned_backup.model.document import fitting_title, replace_all
from oned_backup.model.host import (
    Host,
    HostState,
    new_host,
    with_paths,
    with_state,
    with_vms,
    without_vm,
)
from oned_backup.model.selection import configure
from oned_backup.model.vm import LcmState, Vm, VmState, new_vm, sync_domain, with_config, without_error
from oned_backup.model.vm import with_state as with_vm_state
from oned_backup.operations.caller import Caller, query_caller
from oned_backup.operations.domains import DomainSummary, DomainView, list_domains, look_up_domains
from oned_backup.operations.services import Services
from oned_backup.ssh.host_keys import HostKey, accept_host_key
from oned_backup.ssh.libvirt_uri import parse_uri
from oned_backup.store import Transaction

#: so many domains are imported in one transaction: others wait so long to write
_AT_ONCE = 250

#: what a backup that is under way does not look at again
_MEANWHILE = RETENTION | {"FS_FREEZE", "CHAIN_LENGTH"}


def add_host(services: Services, name: str, *, uri: str, vm_mad: str, tm_mad: str, accept: str = "") -> Host:
    """The new host, reached once; nothing is added if it cannot be reached.

    `accept`: the fingerprint of its host key, which is known from now on.
    """
    driver = services.driver(Kind.VMM, vm_mad)
    services.driver(Kind.TM, tm_mad)
    target = parse_uri(uri).target if "libvirt" in driver.manifest.features else ""
    if accept:
        accept_key(services, target, accept)
    element = services.store.create(
        "host", lambda host_id: new_host(host_id, name=name, uri=uri, vm_mad=vm_mad, tm_mad=tm_mad).element
    )
    host = Host(element)
    try:
        look_at_host(services, host.id)
    except OnedBackupError:
        services.store.delete("host", host.id)
        raise
    return services.host(host.id)


def accept_key(services: Services, target: str, fingerprint: str) -> HostKey:
    """Know the host key with that fingerprint from now on, and no other of the machine at `target`."""
    if not target:
        raise InvalidInput("there is no host key to accept: nothing is reached by ssh")
    return accept_host_key(services.settings.ssh_config, target, fingerprint)


def look_at_host(services: Services, host_id: int) -> tuple[DomainSummary, ...]:
    """The host's domains; its state is brought up to date, also when it cannot be reached."""
    try:
        domains = list_domains(query_caller(services, "monitor"), services.host(host_id))
    except Unavailable as error:
        text = str(error)
        services.store.change(
            "host", host_id, lambda element: with_state(Host(element), HostState.ERROR, text).element
        )
        raise
    services.store.change(
        "host", host_id, lambda element: with_state(Host(element), HostState.MONITORED).element
    )
    return domains


def update_host(services: Services, host_id: int, values: Mapping[str, str]) -> Host:
    """The host with other directories of its own (`model.host.PATHS`)."""
    return Host(
        services.store.change("host", host_id, lambda element: with_paths(Host(element), values).element)
    )


def remove_host(services: Services, host_id: int, *, force: bool) -> None:
    """Forget a host. Its VMs go with it if `force`; those that have backups stay, in state DONE."""
    vms = [Vm(entry.element) for entry in services.store.find("vm", host_id=host_id)]
    there = [vm for vm in vms if vm.state != VmState.DONE]
    if there and not force:
        raise Conflict(
            f"host {host_id} has {len(there)} imported VMs",
            hint="--force forgets them with it; their backups are kept.",
        )
    with services.store.transaction() as tx:
        tx.get("host", host_id)
        for vm in there:
            _forget(tx, vm)
        tx.delete("host", host_id)


def forget_vm(services: Services, vm_id: int) -> Vm:
    """Back up a VM no more: what it was. If it has images it stays, in state DONE, else it goes.

    Its domain, where there is one, is not touched; to import that makes it the VM that it was.
    """
    with services.store.transaction() as tx:
        vm = Vm(tx.get("vm", vm_id).element)
        if vm.state == VmState.DONE and tx.find("image", vm_id=vm_id):
            raise Conflict(
                f"VM {vm_id} ({vm.name}) is forgotten already, but for its images",
                hint=f"When the last one is deleted it goes: `oned-backup image list --vm {vm_id}`.",
            )
        _forget(tx, vm)
        for entry in tx.find("host"):
            host = Host(entry.element)
            if vm_id in host.vm_ids:
                tx.change("host", host.id, lambda element: without_vm(Host(element), vm_id).element)
    return vm


def _forget(tx: Transaction, vm: Vm) -> None:
    _refuse_busy(tx, vm)
    if tx.find("image", vm_id=vm.id):
        done = with_vm_state(without_error(vm), VmState.DONE, LcmState.INIT)
        tx.change("vm", vm.id, lambda _old: done.element)
    else:
        tx.delete("vm", vm.id)


def _refuse_busy(tx: Transaction, vm: Vm) -> None:
    for operation in tx.journal.list(vm_id=vm.id, limit=20):
        if not operation.state.is_final:
            raise Conflict(f"VM {vm.id} ({vm.name}): {operation.kind} {operation.id} is {operation.state}")


def import_vms(
    services: Services, host_id: int, names: Sequence[str], *, every: bool
) -> list[dict[str, Any]]:
    """Import domains by name or UUID, or all; what became of each. Known ones are brought up to date."""
    if every == bool(names):
        raise InvalidInput("name the domains to import, or use --all")
    host = services.host(host_id)
    domains = look_at_host(services, host_id)
    if every:
        wanted = list(domains)
    else:
        by_name = {key: domain for domain in domains for key in (domain.uuid, domain.name)}
        unknown = [name for name in names if name not in by_name]
        if unknown:
            known = ", ".join(sorted(domain.name for domain in domains)) or "none"
            raise NotFound(f"host {host.name} has no domain '{unknown[0][:64]}'", hint=f"It has {known}.")
        wanted = list(dict.fromkeys(by_name[name] for name in names))
    caller = query_caller(services, "import")
    imported: list[dict[str, Any]] = []
    for first in range(0, len(wanted), _AT_ONCE):
        imported += _import_some(services, caller, host, wanted[first : first + _AT_ONCE])
    return imported


def _import_some(
    services: Services, caller: Caller, host: Host, domains: Sequence[DomainSummary]
) -> list[dict[str, Any]]:
    views = look_up_domains(caller, host, [domain.uuid for domain in domains])
    imported: list[dict[str, Any]] = []
    with services.store.transaction() as tx:
        for domain in domains:
            if domain.uuid in views:  # else it was undefined since
                vm, result = _import_vm(services, tx, host, domain, views[domain.uuid])
                found = {"id": vm.id, "name": vm.name, "uuid": vm.uuid, "state": domain.state.value}
                imported.append({**found, "result": result})
        here = [entry["id"] for entry in imported if entry["result"] != "known"]
        tx.change("host", host.id, lambda element: with_vms(Host(element), here).element)
    return imported


def _import_vm(
    services: Services, tx: Transaction, host: Host, domain: DomainSummary, view: DomainView
) -> tuple[Vm, str]:
    """The domain's VM, and what became of it; its host does not know yet that it has it."""
    known = [Vm(entry.element) for entry in tx.find("vm", uuid=domain.uuid)]
    old = next((vm for vm in known if vm.host_id == host.id), known[-1] if known else None)
    now = int(services.clock())

    def document(vm_id: int) -> Vm:
        return new_vm(
            vm_id,
            name=fitting_title(domain.name),
            placement=host.placement,
            domain=view.xml,
            state=view.state,
            capacity_bytes=view.capacity_bytes,
            date=now,
        )

    if old is None:
        return Vm(tx.create("vm", lambda vm_id: document(vm_id).element)), "imported"
    if old.host_id == host.id and old.state != VmState.DONE:
        return old, "known"
    vm = _adopted(document(old.id), old, view)
    if old.host_id != host.id and tx.find("host", name=old.host_name):
        before = Host(tx.find("host", name=old.host_name)[0].element)
        tx.change("host", before.id, lambda element: without_vm(Host(element), vm.id).element)
    tx.change("vm", old.id, lambda _old: vm.element)
    return vm, "adopted"


def _adopted(new: Vm, old: Vm, view: DomainView) -> Vm:
    """`old`, which was here before (in another catalogue, or on another host), where `new` is.

    It keeps its backups, its configuration and the ids of its disks.
    """
    element = xmldoc.copy(old.element)
    for path in ("HISTORY_RECORDS", "TEMPLATE/TM_MAD_SYSTEM"):
        parent, _, tag = path.rpartition("/")
        section = element.find(parent) if parent else element
        there = new.element.find(path)
        if section is not None and there is not None:
            replace_all(section, tag, [xmldoc.copy(there)])
    date = xmldoc.integer(new.element, "LAST_POLL")
    moved = sync_domain(Vm(element), view.xml, view.state, view.capacity_bytes, date=date)
    return with_config(moved, new.config) if old.host_id < 0 else moved


def configure_vm(services: Services, vm_id: int, values: Mapping[str, str]) -> tuple[Vm, bool]:
    """The VM with the user's BACKUP_CONFIG values, and whether that ends its active chain."""
    before = services.vm(vm_id)

    def configured(element: Any) -> Any:
        if Vm(element).in_backup and not _MEANWHILE.issuperset(values):
            raise Conflict(
                f"VM {vm_id} is being backed up: only {', '.join(sorted(_MEANWHILE))} can be set meanwhile",
                hint="Wait till it is finished, or cancel it.",
            )
        return configure(Vm(element), values).element

    after = Vm(services.store.change("vm", vm_id, configured))
    return after, before.config.has_chain and not after.config.has_chain
