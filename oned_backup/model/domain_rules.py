"""What of a domain's XML may travel into a restored domain: the allow-list itself.

Everything that is not named here is left behind. What is named can neither
name a file of the host, nor run a program on it, nor hand over one of its
devices; parts that could (disks, interfaces, consoles, firmware, kernels) are
rebuilt by `domain.py`. Source: https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    """What an element may carry.

    `accepts`: attribute to the only values that let the element in. `replaced`:
    attributes that are always set anew, so that nobody need be told.
    """

    attributes: frozenset[str] = frozenset()
    text: bool = False
    accepts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    children: Mapping[str, Rule] = field(default_factory=dict)
    replaced: frozenset[str] = frozenset()


def rule(
    attributes: str = "",
    *,
    text: bool = False,
    accepts: Mapping[str, str] | None = None,
    children: Mapping[str, Rule] | None = None,
    replaced: str = "",
) -> Rule:
    """A `Rule` from words separated by spaces."""
    allowed = {name: frozenset(values.split()) for name, values in (accepts or {}).items()}
    names = frozenset(attributes.split()) | frozenset(allowed)
    return Rule(names, text, allowed, children or {}, frozenset(replaced.split()))


def _each(names: str, shared: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), shared)


_TEXT = rule(text=True)
_SIZE = rule("unit", text=True)

ADDRESS = rule(
    "domain bus slot function multifunction controller target unit port iobase irq reg cssid ssid devno base",
    accepts={
        "type": "pci drive virtio-serial usb ccw spapr-vio isa dimm virtio-mmio ccid virtio-s390 unassigned"
    },
)
BOOT = rule("order loadparm")
VIRTIO_DRIVER = rule("iommu ats packed page_per_vq")

_FEATURE = rule(
    "state mode version value unit eoi retries spinlocks driver policy vendor_id",
    children=_each(
        "relaxed vapic spinlocks vpindex runtime synic stimer reset vendor_id frequencies reenlightenment"
        " tlbflush ipi avic evmcs emsr_bitmap xmm_input hidden hint-dedicated poll-control pv-ipi"
        " dirty-ring xen_platform_pci e820_host passthrough",
        rule(
            "state mode value size retries",
            children={**_each("direct extended", rule("state"))},
        ),
    )
    | {"tseg": _SIZE, "tb-cache": _SIZE},
)

_CPU = rule(
    "mode match check migratable",
    children={
        "model": rule("fallback vendor_id", text=True),
        "vendor": _TEXT,
        "topology": rule("sockets dies clusters cores threads"),
        "cache": rule("level mode"),
        "maxphysaddr": rule("mode bits limit"),
        "feature": rule("name policy"),
        "numa": rule(
            children={
                "cell": rule(
                    "id cpus memory unit discard",
                    children={"distances": rule(children={"sibling": rule("id value")})},
                )
            }
        ),
    },
)

_CLOCK = rule(
    "offset adjustment basis timezone start",
    children={
        "timer": rule(
            "name tickpolicy present track mode frequency",
            children={"catchup": rule("threshold slew limit")},
        )
    },
)

_SYSINFO = rule(
    accepts={"type": "smbios"},
    children=_each("bios system baseBoard chassis", rule(children={"entry": rule("name", text=True)}))
    | {"oemStrings": rule(children={"entry": _TEXT})},
)

_END = "destroy restart preserve rename-restart"

#: direct children of `<domain>` that are copied as they are
DOMAIN: dict[str, Rule] = {
    "title": _TEXT,
    "description": _TEXT,
    "memory": rule("unit dumpCore", text=True),
    "currentMemory": _SIZE,
    "maxMemory": rule("unit slots", text=True),
    "vcpu": rule("current", text=True, replaced="placement"),
    "iothreads": _TEXT,
    "iothreadids": rule(children={"iothread": rule("id thread_pool_min thread_pool_max")}),
    "cpu": _CPU,
    "clock": _CLOCK,
    "features": rule(
        children=_each(
            "acpi apic pae hap viridian hyperv kvm pvspinlock pmu vmport gic smm ioapic hpt vmcoreinfo"
            " htm nested-hv ccf-assist msrs cfpc sbbc ibs tcg async-teardown ras",
            _FEATURE,
        )
    ),
    "pm": rule(children=_each("suspend-to-mem suspend-to-disk", rule("enabled"))),
    "sysinfo": _SYSINFO,
}

#: children of `<domain>` whose text must be one of these
DOMAIN_TEXTS: dict[str, frozenset[str]] = {
    "on_poweroff": frozenset(_END.split()),
    "on_reboot": frozenset(_END.split()),
    "on_crash": frozenset(_END.split()),
    "on_lockfailure": frozenset({"poweroff", "restart", "pause", "ignore"}),
}

#: children of `<os>` that are copied as they are
OS: dict[str, Rule] = {
    "type": rule("arch machine", text=True),
    "boot": rule("dev"),
    "bootmenu": rule("enable timeout"),
    "bios": rule("useserial rebootTimeout"),
    "smbios": rule(accepts={"mode": "emulate sysinfo"}),
    "firmware": rule(children={"feature": rule("enabled name")}),
}

#: where distributions put firmware; a loader or nvram template elsewhere is left behind
FIRMWARE_ROOTS = (
    "/usr/share/OVMF",
    "/usr/share/ovmf",
    "/usr/share/AAVMF",
    "/usr/share/edk2",
    "/usr/share/edk2-ovmf",
    "/usr/share/edk2-aarch64",
    "/usr/share/qemu",
    "/usr/share/qemu-efi-aarch64",
    "/usr/share/qemu-efi-riscv64",
    "/usr/share/seabios",
)

#: where distributions put QEMU: that the restored domain runs the host's own is no news
EMULATOR_ROOTS = ("/usr/bin", "/usr/libexec")

#: devices that are copied as they are
DEVICES: dict[str, Rule] = {
    "controller": rule(
        "index model ports vectors maxEventChannels maxGrantFrames",
        accepts={"type": "usb scsi sata ide virtio-serial pci fdc ccid"},
        children={
            "address": ADDRESS,
            "master": rule("startport"),
            "model": rule("name"),
            "target": rule("chassisNr chassis port busNr index hotplug memReserve"),
            "driver": rule("queues cmd_per_lun max_sectors ioeventfd iothread iommu ats packed"),
        },
    ),
    "input": rule(
        "bus model",
        accepts={"type": "mouse tablet keyboard"},
        children={"address": ADDRESS, "driver": VIRTIO_DRIVER},
    ),
    "graphics": rule(
        "passwd passwdValidTo connected keymap listen sharePolicy defaultMode powerControl",
        accepts={"type": "vnc spice"},
        replaced="port autoport",
        children={
            "listen": rule("address network", accepts={"type": "address network none"}),
            "channel": rule("name mode"),
            "image": rule("compression"),
            "jpeg": rule("compression"),
            "zlib": rule("compression"),
            "playback": rule("compression"),
            "streaming": rule("mode"),
            "clipboard": rule("copypaste"),
            "mouse": rule("mode"),
            "filetransfer": rule("enable"),
        },
    ),
    "video": rule(
        children={
            "address": ADDRESS,
            "driver": VIRTIO_DRIVER,
            "model": rule(
                "ram vram vram64 vgamem heads primary",
                accepts={"type": "vga cirrus qxl virtio gop bochs ramfb vmvga none"},
                children={"resolution": rule("x y")},
            ),
        }
    ),
    "memballoon": rule(
        "autodeflate freePageReporting",
        accepts={"model": "virtio virtio-transitional virtio-non-transitional none"},
        children={"address": ADDRESS, "driver": VIRTIO_DRIVER, "stats": rule("period")},
    ),
    "watchdog": rule(
        "model",
        accepts={"action": "reset shutdown poweroff pause none inject-nmi"},
        children={"address": ADDRESS},
    ),
    "sound": rule(
        accepts={"model": "sb16 es1370 pcspk ac97 ich6 ich7 ich9 usb virtio"},
        children={"address": ADDRESS, "codec": rule("type")},
    ),
    "audio": rule("id", accepts={"type": "none spice"}),
    "rng": rule(
        accepts={"model": "virtio virtio-transitional virtio-non-transitional"},
        children={
            "address": ADDRESS,
            "driver": VIRTIO_DRIVER,
            "rate": rule("period bytes"),
            "backend": rule(text=True, accepts={"model": "random"}),
        },
    ),
    "tpm": rule(
        accepts={"model": "tpm-tis tpm-crb tpm-spapr tpm-tis-device"},
        children={
            "address": ADDRESS,
            "backend": rule("persistent_state", accepts={"type": "emulator", "version": "1.2 2.0"}),
        },
    ),
    "panic": rule(accepts={"model": "isa hyperv pseries s390 pvpanic"}, children={"address": ADDRESS}),
    "iommu": rule(
        accepts={"model": "intel smmuv3 virtio"},
        children={
            "address": ADDRESS,
            "driver": rule("intremap caching_mode eim iotlb aw_bits"),
        },
    ),
}

#: the child without which one of these devices is left behind
ESSENTIAL = {"rng": "backend", "tpm": "backend", "video": "model"}

DISK_DRIVER = rule(
    "cache io discard detect_zeroes discard_no_unref error_policy rerror_policy event_idx ioeventfd"
    " iothread queues queue_size copy_on_read iommu ats packed",
    replaced="name type",
)
DISK: dict[str, Rule] = {
    "target": rule("dev bus removable rotation_rate tray"),
    "boot": BOOT,
    "serial": _TEXT,
    "wwn": _TEXT,
    "vendor": _TEXT,
    "product": _TEXT,
    "address": ADDRESS,
    "geometry": rule("cyls heads secs trans"),
    "blockio": rule("logical_block_size physical_block_size discard_granularity"),
    "readonly": rule(),
    "transient": rule(),
    "iotune": rule(
        children=_each(
            "total_bytes_sec read_bytes_sec write_bytes_sec total_iops_sec read_iops_sec write_iops_sec"
            " total_bytes_sec_max read_bytes_sec_max write_bytes_sec_max total_iops_sec_max"
            " read_iops_sec_max write_iops_sec_max size_iops_sec",
            _TEXT,
        )
    ),
}

INTERFACE_SOURCES = {
    "network": rule("network portgroup"),
    "bridge": rule("bridge"),
    "direct": rule("dev mode"),
    "user": rule(),
}
INTERFACE: dict[str, Rule] = {
    "mac": rule("address type"),
    "model": rule("type"),
    "driver": rule(
        "txmode ioeventfd event_idx queues rx_queue_size tx_queue_size iommu ats packed",
        accepts={"name": "vhost qemu"},
    ),
    "virtualport": rule("type", children={"parameters": rule("profileid")}),
    "boot": BOOT,
    "link": rule("state"),
    "mtu": rule("size"),
    "port": rule("isolated"),
    "vlan": rule("trunk", children={"tag": rule("id nativeMode")}),
    "filterref": rule("filter", children={"parameter": rule("name value")}),
    "bandwidth": rule(children=_each("inbound outbound", rule("average peak burst floor"))),
    "rom": rule("bar enabled"),
    "address": ADDRESS,
}

CONSOLE: dict[str, Rule] = {
    "target": rule("type port name", children={"model": rule("name")}),
    "address": ADDRESS,
}

#: the channels a guest's agents listen on: type to the names that may be on it
CHANNELS = {
    "unix": frozenset({"org.qemu.guest_agent.0"}),
    "spicevmc": frozenset({"com.redhat.spice.0"}),
}
CHANNEL: dict[str, Rule] = {
    "target": rule("type name"),
    "address": ADDRESS,
}
