"""A restored domain's XML, rebuilt from the stored one by an allow-list.

The XML in a backup may come from anywhere, and whoever defines it does so with
libvirt's rights. So nothing is passed through: a new document is made from what
`domain_rules` names. Everything that names a file of the host is left behind
or replaced:

    disks       only those that were restored, with their new paths; CD-ROM and floppy
                drives stay, empty; other disks are left behind
    firmware    a loader from where distributions install firmware; NVRAM where it was restored to
    kernel      kernel, initrd and their command line only if the files lie under an allowed root
    consoles    serial ports and consoles become ptys
    interfaces  on a network, a bridge, a host device by macvtap, or user networking

Left behind as well: qemu:commandline, the emulator's path, host devices, file
systems, security labels, metadata, CPU and memory pinning. `Rebuilt.dropped`
names it all, to be shown.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model import domain_rules as rules
from oned_backup.model.document import checked_title, replace_all
from oned_backup.model.domain_rules import Rule

_MAX_DROPPED = 200
_MAX_DROPPED_CHARACTERS = 160
_RANDOM_SOURCES = frozenset({"/dev/urandom", "/dev/random"})
_FORMATS = frozenset({"qcow2", "raw"})
_EMPTIED = frozenset({"cdrom", "floppy"})


@dataclass(frozen=True)
class RestoredDisk:
    """Where a disk was restored to."""

    path: str
    format: str


@dataclass(frozen=True)
class Rebuilt:
    """The new domain, and what of the old one is not in it."""

    element: xmldoc.Element
    dropped: tuple[str, ...]


def rebuild_domain(
    domain: xmldoc.Element,
    *,
    name: str,
    disks: Mapping[str, RestoredDisk],
    allowed_roots: Sequence[str],
    uuid: str = "",
    nvram_path: str = "",
    no_nic: bool = False,
    no_ip: bool = False,
) -> Rebuilt:
    """The domain `name` with its `disks` (by target), made from the stored `domain`.

    Without `uuid` libvirt makes one. `no_nic` leaves out all interfaces; `no_ip`
    lets libvirt give them new MAC addresses, so that no lease or filter of the
    original applies. `InvalidInput` if a path is not under an allowed root, a
    disk's target is not in `domain`, or it is no QEMU domain.
    """
    builder = _Builder(tuple(allowed_roots), no_nic=no_nic, no_ip=no_ip)
    kind = domain.get("type", "")
    if domain.tag != "domain" or kind not in {"kvm", "qemu"}:
        raise InvalidInput(f"domain XML: <{str(domain.tag)[:40]} type='{kind[:40]}'> is no QEMU domain")
    new = xmldoc.build("domain")
    new.set("type", kind)
    new.append(xmldoc.build("name", _checked_domain_name(name)))
    if uuid:
        new.append(xmldoc.build("uuid", uuid))
    builder.domain(domain, new, disks, nvram_path)
    return Rebuilt(new, builder.dropped)


def path_below(path: str, roots: Sequence[str]) -> bool:
    """Whether `path` is absolute, normal and beneath one of `roots`, by its text alone."""
    return (
        path.startswith("/")
        and posixpath.normpath(path) == path
        and path.isprintable()
        and any(path.startswith(posixpath.normpath(root).rstrip("/") + "/") for root in roots)
    )


def _checked_domain_name(name: str) -> str:
    if "/" in name or name in {".", ".."}:
        raise InvalidInput(f"'{name[:80]}' cannot be a domain's name: it has a slash")
    return checked_title(name)


class _Builder:
    """One rebuilding: its options, and the list of what was left behind."""

    def __init__(self, roots: tuple[str, ...], *, no_nic: bool, no_ip: bool) -> None:
        self._roots = roots
        self._no_nic = no_nic
        self._no_ip = no_ip
        self._dropped: dict[str, None] = {}

    @property
    def dropped(self) -> tuple[str, ...]:
        """What was left behind, in document order, each once."""
        found = list(self._dropped)
        if len(found) > _MAX_DROPPED:
            return (*found[:_MAX_DROPPED], f"and {len(found) - _MAX_DROPPED} more")
        return tuple(found)

    def domain(
        self,
        old: xmldoc.Element,
        new: xmldoc.Element,
        disks: Mapping[str, RestoredDisk],
        nvram_path: str,
    ) -> None:
        """Fill `new` with what may stay of `old`."""
        if old.find("genid") is not None:
            new.append(xmldoc.build("genid"))  # empty: libvirt makes a new one, as for any copy of a VM
        for child in old:
            tag = str(child.tag)
            if tag in rules.DOMAIN:
                self._append(new, child, rules.DOMAIN[tag], tag)
            elif tag in rules.DOMAIN_TEXTS and (child.text or "").strip() in rules.DOMAIN_TEXTS[tag]:
                new.append(xmldoc.build(tag, (child.text or "").strip()))
            elif tag == "os":
                new.append(self._os(child, nvram_path))
            elif tag not in {"name", "uuid", "genid", "devices"}:
                self._drop(tag)
        devices = xmldoc.build("devices")
        for device in old.iterfind("devices/*"):
            self._device(device, devices, disks)
        missing = sorted(set(disks) - {target.get("dev") for target in devices.iterfind("disk/target")})
        if missing:
            raise InvalidInput(f"domain XML has no disk {missing[0][:40]}")
        new.append(devices)

    def _os(self, old: xmldoc.Element, nvram_path: str) -> xmldoc.Element:
        new = xmldoc.build("os")
        if old.get("firmware") in {"bios", "efi"}:
            new.set("firmware", old.get("firmware", ""))
        booted = {tag: (old.findtext(tag) or "").strip() for tag in ("kernel", "initrd")}
        kernel = path_below(booted["kernel"], self._roots)
        for child in old:
            tag = str(child.tag)
            if tag in rules.OS:
                self._append(new, child, rules.OS[tag], f"os/{tag}")
            elif tag == "loader":
                self._loader(child, new)
            elif tag == "nvram":
                self._nvram(child, new, nvram_path)
            elif kernel and (tag == "cmdline" or (tag in booted and path_below(booted[tag], self._roots))):
                new.append(xmldoc.build(tag, (child.text or "").strip()))
            else:
                self._drop(f"os/{tag}", (child.text or "").strip())
        return new

    def _loader(self, old: xmldoc.Element, new: xmldoc.Element) -> None:
        path = (old.text or "").strip()
        if path and not path_below(path, rules.FIRMWARE_ROOTS):
            self._drop("os/loader", path)
            return
        loader = xmldoc.build("loader", path or None)
        for attribute, accepted in (
            ("readonly", {"yes", "no"}),
            ("secure", {"yes", "no"}),
            ("stateless", {"yes", "no"}),
            ("type", {"rom", "pflash"}),
            ("format", _FORMATS),
        ):
            if old.get(attribute) in accepted:
                loader.set(attribute, old.get(attribute, ""))
        if path and loader.get("type") == "pflash":
            loader.set("readonly", "yes")  # firmware is shared by all guests of the host
        new.append(loader)

    def _nvram(self, old: xmldoc.Element, new: xmldoc.Element, nvram_path: str) -> None:
        """NVRAM at `nvram_path`; without it, libvirt makes an empty one from the template."""
        nvram = xmldoc.build("nvram")
        template = old.get("template", "")
        if path_below(template, rules.FIRMWARE_ROOTS):
            nvram.set("template", template)
        if old.get("format") in _FORMATS and nvram_path:
            nvram.set("format", old.get("format", ""))
        if nvram_path:
            nvram.text = self._own_path(nvram_path, "NVRAM")
        else:
            self._drop("os/nvram", "its content is not restored")
        if nvram_path or nvram.get("template"):
            new.append(nvram)

    def _device(
        self, old: xmldoc.Element, devices: xmldoc.Element, disks: Mapping[str, RestoredDisk]
    ) -> None:
        tag = str(old.tag)
        if tag == "disk":
            self._disk(old, devices, disks)
        elif tag == "interface":
            self._interface(old, devices)
        elif tag in {"serial", "console"}:
            self._console(old, devices)
        elif tag == "channel":
            self._channel(old, devices)
        elif tag in rules.DEVICES:
            self._generic(old, devices, rules.DEVICES[tag])
        elif tag != "emulator" or not path_below(old.text or "", rules.EMULATOR_ROOTS):
            self._drop(tag, old.get("type", old.get("model", old.text or "")))

    def _generic(self, old: xmldoc.Element, devices: xmldoc.Element, allowed: Rule) -> None:
        """A device that is copied, if what it cannot do without came through."""
        tag = str(old.tag)
        device = self._copied(old, allowed, tag)
        if device is None:
            return
        essential = device.find(rules.ESSENTIAL[tag]) if tag in rules.ESSENTIAL else device
        if essential is None or (tag == "rng" and essential.text not in _RANDOM_SOURCES):
            self._drop(tag, f"without {rules.ESSENTIAL[tag]}")
            return
        if tag == "graphics":
            device.set("autoport", "yes")  # the original may be running with the same port
        devices.append(device)

    def _disk(self, old: xmldoc.Element, devices: xmldoc.Element, disks: Mapping[str, RestoredDisk]) -> None:
        target = old.find("target")
        name = "" if target is None else target.get("dev", "")
        device = old.get("device", "disk")
        restored = disks.get(name)
        twice = any(found.get("dev") == name for found in devices.iterfind("disk/target"))
        if not name or twice or (restored is None and device not in _EMPTIED):
            self._drop("disk", f"{name}: not in the backup")
            return
        new = xmldoc.build("disk")
        driver = xmldoc.build("driver")
        driver.set("name", "qemu")
        new.append(driver)
        if restored is None:
            new.set("type", "file")
            new.set("device", device)
            driver.set("type", "raw")
        else:
            new.set("device", "disk")
            self._disk_source(new, driver, old, restored)
        for child in old:
            tag = str(child.tag)
            if tag in rules.DISK:
                self._append(new, child, rules.DISK[tag], f"disk/{tag}")
            elif tag not in {"source", "driver", "alias", "backingStore"}:
                self._drop(f"disk/{tag}")
        devices.append(new)

    def _disk_source(
        self,
        new: xmldoc.Element,
        driver: xmldoc.Element,
        old: xmldoc.Element,
        restored: RestoredDisk,
    ) -> None:
        if restored.format not in _FORMATS:
            raise InvalidInput(f"disk format '{restored.format[:20]}' is none of {', '.join(_FORMATS)}")
        block = restored.path.startswith("/dev/")
        new.set("type", "block" if block else "file")
        source = xmldoc.build("source")
        source.set("dev" if block else "file", self._own_path(restored.path, "disk"))
        new.append(source)
        before = old.find("driver")
        tuning = None if before is None else self._copied(before, rules.DISK_DRIVER, "disk/driver")
        if tuning is not None:
            for key, value in tuning.attrib.items():
                driver.set(key, value)
        driver.set("type", restored.format)

    def _interface(self, old: xmldoc.Element, devices: xmldoc.Element) -> None:
        kind = old.get("type", "")
        if self._no_nic or kind not in rules.INTERFACE_SOURCES:
            self._drop("interface", "" if self._no_nic else kind)
            return
        new = xmldoc.build("interface")
        new.set("type", kind)
        if old.get("trustGuestRxFilters") in {"yes", "no"}:
            new.set("trustGuestRxFilters", old.get("trustGuestRxFilters", ""))
        for child in old:
            tag = str(child.tag)
            if tag == "source":
                self._append(new, child, rules.INTERFACE_SOURCES[kind], "interface/source")
            elif tag == "mac" and self._no_ip:
                continue
            elif tag in rules.INTERFACE:
                self._append(new, child, rules.INTERFACE[tag], f"interface/{tag}")
            elif tag not in {"target", "alias"}:
                self._drop(f"interface/{tag}")
        for nwfilter in new.findall("filterref") if self._no_ip else ():
            replace_all(nwfilter, "parameter", [])  # they name the original's address
        devices.append(new)

    def _console(self, old: xmldoc.Element, devices: xmldoc.Element) -> None:
        tag = str(old.tag)
        kind = old.get("type", "")
        if kind != "pty":
            self._drop(tag, f"{kind}: it is a pty now")
        new = xmldoc.build(tag)
        new.set("type", "pty")
        self._children(old, new, rules.CONSOLE, tag, ignored={"source", "alias"})
        devices.append(new)

    def _channel(self, old: xmldoc.Element, devices: xmldoc.Element) -> None:
        kind = old.get("type", "")
        target = old.find("target")
        name = "" if target is None else target.get("name", "")
        if (
            target is None
            or target.get("type") != "virtio"
            or name not in rules.CHANNELS.get(kind, frozenset())
        ):
            self._drop("channel", f"{kind} {name}")
            return
        new = xmldoc.build("channel")
        new.set("type", kind)
        self._children(old, new, rules.CHANNEL, "channel", ignored={"source", "alias"})
        devices.append(new)

    def _children(
        self,
        old: xmldoc.Element,
        new: xmldoc.Element,
        allowed: Mapping[str, Rule],
        path: str,
        ignored: set[str],
    ) -> None:
        for child in old:
            tag = str(child.tag)
            if tag in allowed:
                self._append(new, child, allowed[tag], f"{path}/{tag}")
            elif tag not in ignored:
                self._drop(f"{path}/{tag}")

    def _append(self, new: xmldoc.Element, old: xmldoc.Element, allowed: Rule, path: str) -> None:
        copied = self._copied(old, allowed, path)
        if copied is not None:
            new.append(copied)

    def _copied(self, old: xmldoc.Element, allowed: Rule, path: str) -> xmldoc.Element | None:
        """What `allowed` lets through of `old`, None if it does not let it in at all."""
        for name, values in allowed.accepts.items():
            if old.get(name) is not None and old.get(name) not in values:
                self._drop(path, f"{name}='{old.get(name, '')}'")
                return None
        new = xmldoc.build(str(old.tag), (old.text or "").strip() or None if allowed.text else None)
        for attribute, value in old.attrib.items():
            if str(attribute) in allowed.attributes and not str(value).startswith("/"):
                new.set(str(attribute), str(value))
            elif attribute not in allowed.replaced:
                self._drop(f"{path}@{attribute!s}", str(value))
        for child in old:
            tag = str(child.tag)
            if tag in allowed.children:
                self._append(new, child, allowed.children[tag], f"{path}/{tag}")
            elif tag != "alias":
                self._drop(f"{path}/{tag}")
        return new

    def _own_path(self, path: str, what: str) -> str:
        if not path_below(path, self._roots):
            raise InvalidInput(
                f"{what} path '{path[:120]}' is not under an allowed root",
                hint=f"Allowed: {', '.join(self._roots) or 'none'}.",
            )
        return path

    def _drop(self, path: str, detail: str = "") -> None:
        text = f"{path}: {' '.join(detail.split())}" if detail.strip() else path
        self._dropped.setdefault(text[:_MAX_DROPPED_CHARACTERS])
