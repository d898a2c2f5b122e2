"""What lists show of a document: a few plain values, so that ten thousand VMs are listed without their XML.

The store keeps a row beside each document, written with it and made of it alone. Count
`VERSION` up when a row gets other values: rows of another version are made again when a
database is opened.
"""

from __future__ import annotations

from typing import Any

from oned_backup import xmldoc
from oned_backup.model.image import Image
from oned_backup.model.vm import Vm

VERSION = 1


def row(kind: str, element: xmldoc.Element) -> dict[str, Any]:
    """The values of a VM or an image, plain data; nothing for other kinds."""
    if kind == "vm":
        return _vm(Vm(element))
    if kind == "image":
        return _image(Image(element))
    return {}


def _vm(vm: Vm) -> dict[str, Any]:
    return {
        "id": vm.id,
        "name": vm.name,
        "uuid": vm.uuid,
        "state": vm.state_name,
        "host_id": vm.host_id,
        "host": vm.host_name,
        "mode": xmldoc.text(vm.element, "BACKUPS/BACKUP_CONFIG/MODE", "FULL").upper(),
        "error": vm.error,
    }


def _image(image: Image) -> dict[str, Any]:
    return {
        "id": image.id,
        "name": image.name,
        "vm_id": image.vm_id,
        "datastore_id": image.datastore_id,
        "datastore": image.datastore_name,
        "state": image.state_name,
        "type": "FULL" if image.element.find("BACKUP_INCREMENTS/INCREMENT") is None else "INCREMENT",
        "size_mb": xmldoc.integer(image.element, "SIZE", 0),
        "created_at": xmldoc.integer(image.element, "REGTIME", 0),
        "error": image.error,
    }
