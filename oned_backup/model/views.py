"""Documents as JSON, for `--json` and scripts.

Repeated elements are lists whether there are none, one or many of them in the
document, and every value is text, so that the shape never depends on the data.
"""

from __future__ import annotations

from typing import Any

import xmltodict

from oned_backup import xmldoc

#: elements that are lists wherever they stand below one of these parents
_LISTS: dict[str, frozenset[str]] = {
    "TEMPLATE": frozenset({"DISK", "NIC", "NIC_ALIAS", "PCI", "SCHED_ACTION", "SNAPSHOT"}),
    "HISTORY_RECORDS": frozenset({"HISTORY"}),
    "BACKUP_INCREMENTS": frozenset({"INCREMENT"}),
    "SNAPSHOTS": frozenset({"SNAPSHOT"}),
    "DATASTORES": frozenset({"DS"}),
    "PCI_DEVICES": frozenset({"PCI"}),
    "NUMA_NODES": frozenset({"NODE"}),
}
_ID_LISTS = frozenset(
    {"BACKUP_IDS", "VMS", "CLONES", "APP_CLONES", "IMAGES", "CLUSTERS", "BACKUP_DISK_IDS", "SCHED_ACTIONS"}
)


def to_json(element: xmldoc.Element) -> dict[str, Any]:
    """The element's content as plain dicts, lists and texts; an empty element is an empty text."""
    content = xmltodict.parse(xmldoc.serialize(element), force_list=_is_list)[element.tag]
    return _shaped(str(element.tag), content) if isinstance(content, dict) else {}


def _is_list(path: list[tuple[str, Any]], key: str, _value: Any) -> bool:
    parent = path[-1][0] if path else ""
    return key in _LISTS.get(parent, ()) or (key == "ID" and parent in _ID_LISTS)


def _shaped(tag: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shaped(key, child) for key, child in value.items()}
    if isinstance(value, list):
        return [_shaped(tag, child) for child in value]
    if value is None:
        return {"ID": []} if tag in _ID_LISTS else ""
    return value
