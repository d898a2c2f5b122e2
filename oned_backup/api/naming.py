"""Documents by what users call them: an id, or a name."""

from __future__ import annotations

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput, NotFound
from oned_backup.store import Store


def resolve(store: Store, kind: str, name_or_id: str) -> int:
    """The id of the document that a user means by its id or its name."""
    what = "VM" if kind == "vm" else kind
    if name_or_id.isdecimal() and len(name_or_id) < 10:
        return xmldoc.integer(store.get(kind, int(name_or_id)).element, "ID")
    found = [xmldoc.integer(entry.element, "ID") for entry in store.find(kind, name=name_or_id)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(map(str, found))
        raise InvalidInput(f"{len(found)} {what}s are named '{name_or_id[:64]}'", hint=f"Use the id: {ids}.")
    raise NotFound(
        f"there is no {what} '{name_or_id[:64]}'", hint=f"`oned-backup {kind} list` shows what there is."
    )
