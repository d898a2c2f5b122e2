"""Clauses about hypervisor drivers: what can be asked of a host without harm. The parameter URI names it."""

from __future__ import annotations

import secrets
from uuid import uuid4

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Request
from oned_backup.errors import NotFound, Unavailable
from oned_backup.model.disk import domain_disks
from oned_backup.model.host import new_host
from oned_backup.model.vm import DomainState
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.called import Called
from oned_backup.runner.kit.clause import NotApplicable, clause

#: of a host with more, these are enough
_DOMAINS = 5


@clause("VMM-01", "monitor tells name, UUID and state of every domain")
def monitor_is_complete(bench: Bench) -> None:
    """No UUID comes twice."""
    called = _ask(bench, "monitor")
    uuids = [_text(called, entry, "UUID") for entry in called.element("DOMAINS", Kind.VMM).iterfind("DOMAIN")]
    if len(uuids) != len(set(uuids)):
        raise called.unmet("DOMAINS has a UUID twice")
    for entry in called.element("DOMAINS", Kind.VMM).iterfind("DOMAIN"):
        _text(called, entry, "NAME")
        _require_state(called, _text(called, entry, "STATE"))


@clause("VMM-02", "dump_xml and dump_domains tell the same of a domain, also asked by its name")
def dumps_agree(bench: Bench) -> None:
    """The XML has the name and UUID that monitor told; dump_domains leaves out what is not there."""
    names = _domains(bench)
    for uuid, name in names.items():
        for key in (uuid, name):
            called = _ask(bench, "dump_xml", DOMAIN=key)
            _require_domain(called, called.element("DOMAIN", Kind.VMM), uuid, name)
            answer = called.answer(Kind.VMM)
            _require_state(called, answer["STATE"])
            _require_capacity(called, answer.get("CAPACITY", ""), called.element("DOMAIN", Kind.VMM))
    if not bench.driver.supports("dump_domains"):
        return
    called = _ask(bench, "dump_domains", DOMAINS=",".join([*names, str(uuid4())]))
    entries = called.element("DOMAINS", Kind.VMM).findall("DOMAIN")
    if sorted(_text(called, entry, "UUID") for entry in entries) != sorted(names):
        raise called.unmet(f"DOMAINS is not about {', '.join(names)} alone")
    for entry in entries:
        uuid, domain = _text(called, entry, "UUID"), entry.find("domain")
        if domain is None:
            raise called.unmet(f"DOMAINS: {uuid} has no <domain>")
        _require_domain(called, domain, uuid, names[uuid])
        _require_state(called, _text(called, entry, "STATE"))
        _require_capacity(called, entry.findtext("CAPACITY", ""), domain)


@clause("VMM-03", "a domain that is positively absent is NotFound (66)")
def absent_domain(bench: Bench) -> None:
    """By UUID and by name; thaw and abort_backup, too."""
    _domains(bench)
    for action in ("dump_xml", "thaw", "abort_backup"):
        for key in (str(uuid4()), f"kit-{secrets.token_hex(6)}"):
            if bench.driver.supports(action):
                _call(bench, action, DOMAIN=key).require(NotFound, "the answer about an absent domain")


@clause("VMM-04", "thaw and abort_backup leave alone what is not ours, and succeed again and again")
def nothing_of_ours(bench: Bench) -> None:
    """No domain is frozen or backed up by the installation that the kit makes up."""
    for uuid in _domains(bench):
        before = _ask(bench, "dump_xml", DOMAIN=uuid).answer(Kind.VMM)["STATE"]
        for action in ("thaw", "abort_backup") * 2:
            if bench.driver.supports(action):
                _ask(bench, action, DOMAIN=uuid)
        called = _ask(bench, "dump_xml", DOMAIN=uuid)
        if called.answer(Kind.VMM)["STATE"] != before:
            raise called.unmet(f"the domain was {before} before thaw and abort_backup")


@clause("VMM-05", "a host that cannot be reached is Unavailable (69), not NotFound")
def unreachable_host(bench: Bench) -> None:
    """With the URI that a store file has in `unreachable`."""
    uri = bench.settings.unreachable.get("URI", "")
    if not uri:
        raise NotApplicable("no store file says which URI is `unreachable`")
    for action in ("monitor", "dump_xml", "dump_domains", "thaw", "abort_backup"):
        if bench.driver.supports(action):
            called = _call(bench, action, uri=uri, DOMAIN=str(uuid4()), DOMAINS=str(uuid4()))
            called.require(Unavailable, "the answer of a host that cannot be reached")


def _call(bench: Bench, action: str, *, uri: str = "", **options: str) -> Called:
    uri = uri or bench.settings.parameters.get("URI", "")
    if not uri:
        raise NotApplicable("no host was given: URI=…")
    host = new_host(1, name="kit", uri=uri, vm_mad=bench.driver.manifest.name).element
    given = {"SOCKET_DIR": str(bench.root / "work"), "INSTALLATION": "00000000", **options}
    return bench.call(
        action, Request(Kind.VMM, f"op-{secrets.token_hex(6)}", "kit", host=host, options=given)
    )


def _ask(bench: Bench, action: str, **options: str) -> Called:
    called = _call(bench, action, **options)
    called.answer(Kind.VMM)
    return called


def _domains(bench: Bench) -> dict[str, str]:
    """The names of some domains of the host, by UUID."""
    called = _ask(bench, "monitor")
    entries = called.element("DOMAINS", Kind.VMM).findall("DOMAIN")[:_DOMAINS]
    if not entries:
        raise NotApplicable("the host has no domain")
    return {_text(called, entry, "UUID"): _text(called, entry, "NAME") for entry in entries}


def _text(called: Called, entry: xmldoc.Element, tag: str) -> str:
    text = entry.findtext(tag, "")
    if not text.strip():
        raise called.unmet(f"an entry of DOMAINS lacks {tag}")
    return text


def _require_state(called: Called, state: str) -> None:
    if state not in set(DomainState):
        raise called.unmet(f"STATE={state} is none of {', '.join(DomainState)}")


def _require_domain(called: Called, domain: xmldoc.Element, uuid: str, name: str) -> None:
    told = domain.tag, domain.findtext("uuid"), domain.findtext("name")
    if told != ("domain", uuid, name):
        raise called.unmet(f"the XML is <{told[0]}> of {told[1]} ({told[2]}), not of {uuid} ({name})")


def _require_capacity(called: Called, capacity: str, domain: xmldoc.Element) -> None:
    """`TARGET:BYTES,…` of disks that the domain has."""
    targets = {disk.target for disk in domain_disks(domain, {})}
    for part in filter(None, capacity.split(",")):
        target, _, size = part.rpartition(":")
        if target not in targets or not size.isdecimal():
            raise called.unmet(f"CAPACITY: {part} is not TARGET:BYTES of one of {', '.join(sorted(targets))}")
