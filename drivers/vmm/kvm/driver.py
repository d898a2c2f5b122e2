"""Hypervisor driver for QEMU/KVM through libvirt: what domains there are, and emergency actions."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

from oned_backup import failpoints, xmldoc
from oned_backup.errors import Conflict, InvalidInput, NotFound, OnedBackupError
from oned_backup.hypervisor import backup_job, freeze, guardian
from oned_backup.hypervisor.connection import connected, libvirt_errors
from oned_backup.hypervisor.domain import Domain, DomainDisk, State, disks, find_domain
from oned_backup.hypervisor.host import Host as Machine
from oned_backup.hypervisor.host import host_for
from oned_backup.hypervisor.qemu_img import top_image
from oned_backup.model.host import Host
from oned_backup.sdk import Answer, Call, Driver
from oned_backup.transfer.companions import unpack_tpm
from oned_backup.transfer.task import socket_dir_on, swtpm_dir_of

_MAX_TPM_BYTES = 64 << 20


class Kvm(Driver):
    """Everything is asked of libvirt; `virsh` is not used."""

    def monitor(self, call: Call) -> Answer:
        """All domains of the host with their states."""
        found = []
        with connected(_host(call).uri) as connection:
            with libvirt_errors("list of domains"):
                handles = connection.listAllDomains(0)
            for handle in handles:
                domain = Domain(handle)
                try:
                    state = domain.state
                except NotFound:  # undefined since
                    continue
                found.append(
                    xmldoc.build("DOMAIN", {"NAME": domain.name, "UUID": domain.uuid, "STATE": state.value})
                )
        return {"DOMAINS": xmldoc.build("DOMAINS", found)}

    def dump_xml(self, call: Call) -> Answer:
        """A domain's definition, its state, and the virtual sizes of its disks."""
        with connected(_host(call).uri) as connection:
            domain = _domain(call, connection)
            return {"DOMAIN": _definition(domain), **_measured(_machine(call), domain)}

    def dump_domains(self, call: Call) -> Answer:
        """The same of many domains, in one connection."""
        found = []
        with connected(_host(call).uri) as connection:
            machine = _machine(call)
            for uuid in call.option("DOMAINS").split(","):
                try:
                    domain = find_domain(connection, uuid, uuid)
                    values = {"UUID": domain.uuid, **_measured(machine, domain)}
                    found.append(xmldoc.build("DOMAIN", {**values, "domain": [_definition(domain)]}))
                except NotFound:  # undefined since
                    continue
        return {"DOMAINS": xmldoc.build("DOMAINS", found)}

    def define(self, call: Call) -> Answer:
        """Define a domain from XML that the daemon has rebuilt; the state of its TPM is there before."""
        domain = xmldoc.parse(call.option("DOMAIN"), what="domain")
        name = xmldoc.text(domain, "name")
        uuid = domain.findtext("uuid") or str(uuid4())
        xmldoc.put(domain, "uuid", uuid)
        archive = call.option("TPM_TAR", "")
        with connected(_host(call).uri) as connection:
            try:
                with libvirt_errors(f"domain {name}"):
                    connection.lookupByName(name)
                raise Conflict(f"the host has a domain named {name} already")
            except NotFound:
                pass
            tpm = _restore_tpm(call, uuid, Path(archive)) if archive else None
            failpoints.reach("tpm.acted")
            try:
                with libvirt_errors(f"define domain {name}"):
                    connection.defineXML(xmldoc.serialize(domain))
            except BaseException:
                if tpm is not None:
                    _machine(call).remove(tpm)
                raise
        return {"DEPLOY_ID": name}

    def thaw(self, call: Call) -> None:
        """Thaw or resume the guest, if an operation of ours had frozen or suspended it and died."""
        with connected(_host(call).uri) as connection:
            domain = _domain(call, connection)
            if not domain.is_active:
                return
            socket_dir = _socket_dir(call, call.option("SOCKET_DIR"))
            freeze.resume_if_noted(_machine(call), domain, socket_dir)
            if domain.state is not State.RUNNING:
                call.warn(
                    f"domain {domain.name} is {domain.state.lower()}: its agent cannot be asked to thaw"
                )
                return
            if warning := guardian.thaw_if_noted(_host(call).uri, _machine(call), domain, socket_dir):
                call.warn(warning)

    def abort_backup(self, call: Call) -> None:
        """End the domain's backup job if it is ours; a guest that was stopped for want of scratch goes on."""
        socket_dir = _socket_dir(call, call.option("SOCKET_DIR"))
        with connected(_host(call).uri) as connection:
            domain = _domain(call, connection)
            if backup_job.abort(domain, socket_dir):
                freeze.resume_after_io_error(domain)


def _host(call: Call) -> Host:
    if call.request.host is None:
        raise InvalidInput("request: the section HOST is needed")
    return Host(call.request.host)


def _machine(call: Call) -> Machine:
    """The machine of the host; nothing is forwarded from it here."""
    return host_for(_host(call).uri, Path("/nonexistent"))


def _socket_dir(call: Call, here: str) -> Path:
    """Where the daemon's operations have their sockets on the host."""
    if not here.startswith("/") or Path(here) == Path("/"):
        raise InvalidInput(f"SOCKET_DIR '{here}' is not an absolute path below the root")
    return socket_dir_on(_machine(call), _host(call), Path(here), call.option("INSTALLATION", ""))


def _domain(call: Call, connection: object) -> Domain:

    key = call.option("DOMAIN")
    return find_domain(connection, key if _is_uuid(key) else "", key)


def _definition(domain: Domain) -> xmldoc.Element:
    return xmldoc.parse(domain.inactive_xml(), what="domain")


def _measured(machine: Machine, domain: Domain) -> dict[str, str]:
    """STATE, and CAPACITY with the virtual sizes of its disks."""
    sizes = {disk.target: _capacity(machine, domain, disk) for disk in disks(domain.xml())}
    capacity = ",".join(f"{target}:{size}" for target, size in sizes.items() if size)
    return {"STATE": domain.state.value, "CAPACITY": capacity}


def _is_uuid(key: str) -> bool:
    return len(key) == 36 and set(key.lower()) <= set("0123456789abcdef-")


def _capacity(machine: Machine, domain: Domain, disk: DomainDisk) -> int:
    """Virtual size in bytes; 0 where there is no medium, or it cannot be told."""
    if not disk.source or disk.type not in {"file", "block"}:
        return 0
    try:
        if domain.is_active:
            return domain.capacity_bytes(disk.target)
        return top_image(machine, disk.source, disk.format).size_bytes
    except OnedBackupError:
        return 0


def _restore_tpm(call: Call, uuid: str, archive: Path) -> Path:
    """Where the state of the domain's TPM is now, from the archive."""
    directory = swtpm_dir_of(_host(call)) / uuid
    machine = _machine(call)
    data = machine.read_file(str(archive), max_bytes=_MAX_TPM_BYTES)
    if data is None:
        raise NotFound(f"{archive} is not there")
    unpack_tpm(machine, data, directory)
    return directory


DRIVER = Kvm()
