"""What a VM's TEMPLATE says of its domain, for people to read; a restore uses domain.xml."""

from __future__ import annotations

from oned_backup import xmldoc
from oned_backup.model.document import replace_all

_AGENT_CHANNEL = "org.qemu.guest_agent.0"


def has_agent_channel(domain: xmldoc.Element) -> bool:
    """Whether the domain has the channel that the QEMU guest agent listens on."""
    names = (target.get("name") for target in domain.iterfind("devices/channel/target"))
    return _AGENT_CHANNEL in names


def described_domain(domain: xmldoc.Element, template: xmldoc.Element) -> dict[str, list[xmldoc.Element]]:
    """TEMPLATE's children that say what the domain is, for people to read; a restore uses domain.xml."""
    old_os = template.find("OS")
    os_element = xmldoc.build("OS") if old_os is None else xmldoc.copy(old_os)
    kind = domain.find("os/type")
    described = {
        "ARCH": "" if kind is None else kind.get("arch", ""),
        "MACHINE": "" if kind is None else kind.get("machine", ""),
        "UUID": domain.findtext("uuid", "").strip(),
    }
    for tag, value in described.items():
        replace_all(os_element, tag, [xmldoc.build(tag, value)] if value else [])
    vcpu = domain.findtext("vcpu", "1").strip() or "1"
    return {
        "CPU": [xmldoc.build("CPU", vcpu)],
        "MEMORY": [xmldoc.build("MEMORY", _memory_mb(domain))],
        "NIC": [_nic(place, nic) for place, nic in enumerate(domain.iterfind("devices/interface"))],
        "OS": [os_element],
        "VCPU": [xmldoc.build("VCPU", vcpu)],
    }


def _memory_mb(domain: xmldoc.Element) -> int:
    memory = domain.find("memory")
    if memory is None:
        return 0
    units = {"b": 1, "bytes": 1, "KB": 10**3, "k": 1024, "KiB": 1024, "MB": 10**6, "M": 1024**2}
    units |= {"MiB": 1024**2, "GB": 10**9, "G": 1024**3, "GiB": 1024**3, "T": 1024**4, "TiB": 1024**4}
    return xmldoc.integer(memory, ".") * units.get(memory.get("unit", "KiB"), 1024) // 1024**2


def _nic(place: int, interface: xmldoc.Element) -> xmldoc.Element:
    values: dict[str, xmldoc.Content] = {}
    for tag, path, attribute in (
        ("BRIDGE", "source", "bridge"),
        ("MAC", "mac", "address"),
        ("MODEL", "model", "type"),
        ("NETWORK", "source", "network"),
    ):
        found = interface.find(path)
        if found is not None and found.get(attribute):
            values[tag] = found.get(attribute)
    return xmldoc.build("NIC", dict(sorted({**values, "NIC_ID": place}.items())))
