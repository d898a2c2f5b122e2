"""Hypervisor driver over a directory of JSON files; see `oned_backup.hypervisor.dummy`."""

from __future__ import annotations

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.hypervisor.dummy import DummyDomain, DummyHost
from oned_backup.model.host import Host
from oned_backup.sdk import Answer, Call, Driver


class Dummy(Driver):
    """Has all actions of a hypervisor driver; nothing it does takes time."""

    def monitor(self, call: Call) -> Answer:
        """All domains with their states."""
        found = [
            xmldoc.build("DOMAIN", {"NAME": domain.name, "UUID": domain.uuid, "STATE": domain.state})
            for domain in _host(call).domains()
        ]
        return {"DOMAINS": xmldoc.build("DOMAINS", found)}

    def dump_xml(self, call: Call) -> Answer:
        """A domain's definition, state and sizes."""
        domain = _host(call).find(call.option("DOMAIN"))
        return {"DOMAIN": domain.to_xml(), "STATE": domain.state, "CAPACITY": _capacity(domain)}

    def dump_domains(self, call: Call) -> Answer:
        """The same of many domains."""
        found = [_entry(domain) for domain in _host(call).find_all(call.option("DOMAINS").split(","))]
        return {"DOMAINS": xmldoc.build("DOMAINS", found)}

    def define(self, call: Call) -> Answer:
        """A new domain, off."""
        return {"DEPLOY_ID": _host(call).define(xmldoc.parse(call.option("DOMAIN"), what="domain")).name}

    def thaw(self, call: Call) -> None:
        """The domain is not frozen afterwards."""
        host = _host(call)
        host.update(host.find(call.option("DOMAIN")), frozen=False)

    def abort_backup(self, call: Call) -> None:
        """Nothing: there are no jobs here that outlive their driver."""
        _host(call).find(call.option("DOMAIN"))


def _entry(domain: DummyDomain) -> xmldoc.Element:
    values = {"UUID": domain.uuid, "STATE": domain.state, "CAPACITY": _capacity(domain)}
    return xmldoc.build("DOMAIN", {**values, "domain": [domain.to_xml()]})


def _capacity(domain: DummyDomain) -> str:
    return ",".join(f"{disk.target}:{disk.size_bytes}" for disk in domain.disks)


def _host(call: Call) -> DummyHost:
    if call.request.host is None:
        raise InvalidInput("request: the section HOST is needed")
    return DummyHost(Host(call.request.host).uri)


DRIVER = Dummy()
