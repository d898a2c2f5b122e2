"""What all documents share: owner, permissions, id lists, and replacing children in place.

A document is never changed: the functions of this package copy it, so that
elements this version does not know survive every change.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput

_MAX_NAME_CHARACTERS = 128
_RIGHTS = tuple(f"{who}_{what}" for who in ("OWNER", "GROUP", "OTHER") for what in ("U", "M", "A"))


@dataclass(frozen=True, eq=False)
class Document:
    """A document over its element, which must not be changed: use the functions of its module."""

    element: xmldoc.Element

    @property
    def id(self) -> int:
        """Its number in the catalogue."""
        return xmldoc.integer(self.element, "ID")

    @property
    def name(self) -> str:
        """The name shown to people."""
        return self.element.findtext("NAME", "")

    @property
    def state(self) -> int:
        """STATE, a number of its kind of document."""
        return xmldoc.integer(self.element, "STATE")


@dataclass(frozen=True)
class Owner:
    """Whom a document belongs to; user 0 is the installation's administrator."""

    uid: int = 0
    gid: int = 0
    uname: str = "oneadmin"
    gname: str = "oneadmin"

    @classmethod
    def of(cls, element: xmldoc.Element) -> Owner:
        """The owner that stands in a document."""
        return cls(
            uid=xmldoc.integer(element, "UID", 0),
            gid=xmldoc.integer(element, "GID", 0),
            uname=xmldoc.text(element, "UNAME", "oneadmin"),
            gname=xmldoc.text(element, "GNAME", "oneadmin"),
        )


ADMINISTRATOR = Owner()


def identity(document_id: int, name: str, owner: Owner) -> dict[str, xmldoc.Content]:
    """The elements with which VM, IMAGE and DATASTORE documents begin."""
    return {
        "ID": document_id,
        "UID": owner.uid,
        "GID": owner.gid,
        "UNAME": owner.uname,
        "GNAME": owner.gname,
        "NAME": checked_title(name),
    }


def permissions() -> dict[str, xmldoc.Content]:
    """PERMISSIONS as OpenNebula's default umask 0177 leaves them: the owner may use and manage."""
    return {right: int(right in {"OWNER_U", "OWNER_M"}) for right in _RIGHTS}


def checked_title(name: str) -> str:
    """`name`, if it can be shown as the name of a document; spaces, quotes and any script are fine."""
    if not name.strip() or len(name) > _MAX_NAME_CHARACTERS or not name.isprintable():
        raise InvalidInput(
            f"name '{name[:40]}' is empty, longer than {_MAX_NAME_CHARACTERS} characters"
            " or has control characters"
        )
    return name


def fitting_title(name: str) -> str:
    """`name`, or what can be shown of it: a hypervisor takes longer and stranger names than documents do."""
    try:
        return checked_title(name)
    except InvalidInput:
        return shown(name, _MAX_NAME_CHARACTERS) or "unnamed"


def shown(text: str, max_characters: int = 400) -> str:
    """`text`, which may be any program's output, as a document can carry it: one short, clean line."""
    clean = "".join(char if char.isprintable() else " " for char in text[: 4 * max_characters])
    return " ".join(clean.split())[:max_characters]


def ids(element: xmldoc.Element, path: str) -> tuple[int, ...]:
    """The numbers of an id list (`<X><ID>1</ID>…</X>`), ascending."""
    listed = element.findall(f"{path}/ID")
    try:
        return tuple(sorted(int(entry.text or "") for entry in listed))
    except ValueError as error:
        raise InvalidInput(f"{element.tag}/{path}: {error}") from error


def id_list(values: Iterable[int]) -> dict[str, xmldoc.Content]:
    """The content of an id list element: ascending, each once."""
    return {"ID": [xmldoc.build("ID", value) for value in sorted(set(values))]}


def add_id(element: xmldoc.Element, tag: str, number: int) -> None:
    """Enter a number into the id list `tag` of `element`, unless it is there."""
    known = ids(element, tag)
    if number not in known:
        section(element, tag).insert(bisect(known, number), xmldoc.build("ID", number))


def replace_all(parent: xmldoc.Element, tag: str, children: Sequence[xmldoc.Element]) -> None:
    """Put `children` where those named `tag` stood; where there were none, in order of name."""
    old = parent.findall(tag)
    if old:
        place = parent.index(old[0])
    else:
        place = next((i for i, child in enumerate(parent) if str(child.tag) > tag), len(parent))
    for child in old:
        parent.remove(child)
    for offset, child in enumerate(children):
        parent.insert(place + offset, child)


def section(element: xmldoc.Element, tag: str) -> xmldoc.Element:
    """The child `tag` of `element`, appended empty if it is not there."""
    found = element.find(tag)
    return xmldoc.put(element, tag, None) if found is None else found


def yes(flag: bool) -> str:
    """A truth value as documents write it."""
    return "YES" if flag else "NO"
