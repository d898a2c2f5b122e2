"""Documents as JSON, for `--json` and scripts.

Repeated elements are lists whether there are none, one or many of them in the
document, and every value is text, so that the shape never depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import xmltodict

from oned_backup import xmldoc

#: by the path that an element's own path ends with: its children that are lists
_LISTS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("VM", "TEMPLATE"): ("DISK", "NIC"),
    ("TEMPLATE",): ("NIC_ALIAS", "PCI", "SCHED_ACTION", "SNAPSHOT"),
    ("HISTORY_RECORDS",): ("HISTORY",),
    ("BACKUP_INCREMENTS",): ("INCREMENT",),
    ("SNAPSHOTS",): ("SNAPSHOT",),
    ("HOST_SHARE", "DATASTORES"): ("DS",),
    ("PCI_DEVICES",): ("PCI",),
    ("NUMA_NODES",): ("NODE",),
}
_ID_LISTS = ("BACKUP_IDS", "VMS", "CLONES", "APP_CLONES", "IMAGES", "CLUSTERS", "BACKUP_DISK_IDS")
_LISTS |= {(tag,): ("ID",) for tag in (*_ID_LISTS, "SCHED_ACTIONS")}

#: these lists are there even when they are empty
_ALWAYS = frozenset(_LISTS) - {("TEMPLATE",), ("SNAPSHOTS",)}


def to_json(element: xmldoc.Element) -> dict[str, Any]:
    """The element's content as plain dicts, lists and texts; an empty element is an empty text."""
    root = str(element.tag)
    content = xmltodict.parse(
        xmldoc.serialize(element),
        strip_whitespace=False,
        force_list=lambda path, key, _value: key in _lists_at(tuple(tag for tag, _ in path), _LISTS),
    )[root]
    shaped = _shaped((root,), content)
    return shaped if isinstance(shaped, dict) else {}


def _lists_at(path: tuple[str, ...], where: Iterable[tuple[str, ...]]) -> list[str]:
    return [name for end in where if path[-len(end) :] == end for name in _LISTS[end]]


def _shaped(path: tuple[str, ...], value: Any) -> Any:
    if isinstance(value, list):
        return [_shaped(path, child) for child in value]
    always = _lists_at(path, _ALWAYS)
    if value is None and not always:
        return ""
    if value is None or isinstance(value, dict):
        content = {key: _shaped((*path, key), child) for key, child in (value or {}).items()}
        return {**content, **{name: content.get(name, []) for name in always}}
    return value
