"""libvirt's checkpoints, taken for what they are: a registry beside the bitmaps in the images.

Libvirt may have forgotten a checkpoint whose bitmap is in the image (the domain
was undefined, moved, or the bitmap was made while it was off), and list one
whose bitmap is gone (QEMU was killed). So nothing that it lists is believed:
`usable_targets` has every disk's bitmap validated by QEMU.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import libvirt

from oned_backup import xmldoc
from oned_backup.errors import DriverFailed, Misconfigured, NotFound, Unsupported
from oned_backup.hypervisor.connection import libvirt_errors
from oned_backup.hypervisor.domain import Domain


def names(domain: Domain, prefix: str) -> list[str]:
    """The checkpoints that libvirt lists for the domain and that begin with `prefix`."""
    with libvirt_errors(f"checkpoints of domain {domain.name}"):
        every = [str(checkpoint.getName()) for checkpoint in domain.handle.listAllCheckpoints(0)]
    return [name for name in every if name.startswith(prefix)]


def usable_targets(domain: Domain, name: str, targets: Iterable[str]) -> set[str]:
    """Those of `targets` from whose bitmap `name` an increment can be taken now.

    The domain must be active. Afterwards libvirt lists the checkpoint with
    exactly these disks (or does not list it, if there are none).
    """
    wanted = sorted(targets)
    if wanted and _redefine(domain, name, wanted):
        return set(wanted)
    usable = [target for target in wanted if _redefine(domain, name, [target])]
    if not usable or not _redefine(domain, name, usable):
        forget(domain, name)
        return set()
    return set(usable)


def remove(domain: Domain, name: str) -> None:
    """Remove a checkpoint with its bitmaps; where a bitmap is gone already, the rest of it."""
    checkpoint = _lookup(domain, name)
    if checkpoint is None:
        return
    if domain.is_active:
        for target in _targets(checkpoint):
            # one disk at a time: a disk whose bitmap is gone must not keep the others'
            remove_bitmap(domain, name, target)
    forget(domain, name)


def remove_bitmap(domain: Domain, name: str, target: str) -> bool:
    """Remove a bitmap, listed or not, from one disk of an active domain; False if that cannot be done.

    QEMU lets a bitmap that it holds for inconsistent be removed, and nothing else: so no validation.
    """
    if not _redefine(domain, name, [target], validate=False):
        return False
    try:
        with libvirt_errors(f"bitmap {name} of {target} of domain {domain.name}"):
            domain.handle.checkpointLookupByName(name).delete(0)
    except DriverFailed:  # the disk has no such bitmap
        forget(domain, name)
        return False
    return True


def forget(domain: Domain, name: str) -> None:
    """Have libvirt list the checkpoint no longer; bitmaps stay as they are."""
    checkpoint = _lookup(domain, name)
    if checkpoint is not None:
        with libvirt_errors(f"checkpoint {name} of domain {domain.name}"):
            checkpoint.delete(libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY)


def checkpoint_xml(name: str, targets: Iterable[str], others: Iterable[str] = ()) -> str:
    """The document for a new checkpoint with a bitmap on each of `targets` and none on `others`."""
    root = xmldoc.build("domaincheckpoint", {"name": name})
    listed = xmldoc.build("disks")
    for target in targets:
        disk = xmldoc.build("disk")
        disk.attrib.update({"name": target, "checkpoint": "bitmap", "bitmap": name})
        listed.append(disk)
    for target in others:
        disk = xmldoc.build("disk")
        disk.attrib.update({"name": target, "checkpoint": "no"})
        listed.append(disk)
    root.append(listed)
    return xmldoc.serialize(root)


def _redefine(domain: Domain, name: str, targets: list[str], *, validate: bool = True) -> bool:
    """Whether libvirt lists the checkpoint for `targets` now; to `validate`, QEMU confirms their bitmaps."""
    root = xmldoc.parse(checkpoint_xml(name, targets), what="checkpoint")
    root.insert(1, xmldoc.build("creationTime", int(time.time())))
    flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE
    if validate:
        flags |= libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
    try:
        with libvirt_errors(f"checkpoint {name} of domain {domain.name}"):
            domain.handle.checkpointCreateXML(xmldoc.serialize(root), flags)
    except (DriverFailed, Misconfigured, NotFound, Unsupported):
        return False
    return True


def _lookup(domain: Domain, name: str) -> Any:
    try:
        with libvirt_errors(f"checkpoint {name} of domain {domain.name}"):
            return domain.handle.checkpointLookupByName(name)
    except NotFound:
        return None


def _targets(checkpoint: Any) -> list[str]:
    with libvirt_errors("checkpoint"):
        root = xmldoc.parse(
            checkpoint.getXMLDesc(libvirt.VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN), what="checkpoint"
        )
    return [
        disk.get("name", "") for disk in root.iterfind("disks/disk") if disk.get("checkpoint") == "bitmap"
    ]
