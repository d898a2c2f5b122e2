"""The one place that touches lxml.

Documents are OpenNebula's: elements with upper-case names, text values, no
attributes and no namespaces. Libvirt's XML goes through the same parser. It
loads no entities, no DTD and nothing from the network, and refuses input
above a limit, so that XML from a store or a guest's description cannot be used
against the process that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TypeAlias

from lxml import etree

from oned_backup.errors import InvalidInput

Element: TypeAlias = etree._Element  # noqa: SLF001 - lxml's only public name for the type

#: lxml locks it, so that threads share it: what it sets up takes as long as a small document
_PARSER = etree.XMLParser(
    resolve_entities=False,
    no_network=True,
    load_dtd=False,
    dtd_validation=False,
    huge_tree=False,
    remove_comments=True,
    remove_pis=True,
)

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024

#: what may stand below an element when it is built from plain values
Content: TypeAlias = "str | int | Element | Mapping[str, Content] | Iterable[Element] | None"


def parse(text: str | bytes, *, what: str = "document", max_bytes: int = MAX_DOCUMENT_BYTES) -> Element:
    """The root element of `text`; `InvalidInput` names `what` if it cannot be parsed safely."""
    data = text.encode() if isinstance(text, str) else text
    if len(data) > max_bytes:
        raise InvalidInput(f"{what}: {len(data)} bytes of XML, at most {max_bytes} are accepted")
    try:
        root = etree.fromstring(data, _PARSER)
    except etree.XMLSyntaxError as error:
        raise InvalidInput(f"{what}: not well-formed XML: {error.msg}") from error
    if getattr(root.getroottree().docinfo, "doctype", ""):
        raise InvalidInput(f"{what}: a document type declaration is not accepted")
    return root


def build(tag: str, content: Content = None) -> Element:
    """An element from plain values: text, numbers, elements, or a mapping of names to these.

    A mapping's value that is a list makes one child an item. Characters that
    XML cannot carry raise `InvalidInput`.
    """
    element = etree.Element(tag)
    fill(element, content)
    return element


def fill(element: Element, content: Content) -> None:
    """Append `content` (see `build`) to `element`."""
    if content is None:
        return
    if isinstance(content, Element):
        element.append(content)
    elif isinstance(content, str | int):
        _set_text(element, str(content))
    elif isinstance(content, Mapping):
        for name, value in content.items():
            if isinstance(value, list | tuple):
                element.extend(item if isinstance(item, Element) else build(name, item) for item in value)
            else:
                element.append(build(name, value))
    else:
        element.extend(content)


def text(element: Element, path: str, default: str = "") -> str:
    """The text at `path` below `element`, stripped; `default` where there is none."""
    found = element.findtext(path)
    return default if found is None or not found.strip() else found.strip()


def integer(element: Element, path: str, default: int | None = None) -> int:
    """The whole number at `path`; `InvalidInput` if it is absent without a default, or no number."""
    found = text(element, path)
    if not found and default is not None:
        return default
    try:
        return int(found)
    except ValueError as error:
        raise InvalidInput(f"{element.tag}/{path}: '{found}' is not a whole number") from error


def put(element: Element, name: str, content: Content) -> Element:
    """Replace the child `name` of `element` (or append it) and return it."""
    child = build(name, content)
    old = element.find(name)
    if old is None:
        element.append(child)
    else:
        element.replace(old, child)
    return child


def serialize(element: Element, *, pretty: bool = False) -> str:
    """The element as text on one line (newlines in values become references) or indented."""
    rendered: str = etree.tostring(element, encoding="unicode", pretty_print=pretty, with_tail=False)
    return rendered if pretty else rendered.replace("\r", "&#13;").replace("\n", "&#10;")


def copy(element: Element) -> Element:
    """A deep copy that can be changed without touching `element`."""
    return deepcopy(element)


def _set_text(element: Element, value: str) -> None:
    try:
        element.text = value
    except ValueError as error:
        raise InvalidInput(f"{element.tag}: value has a character that XML cannot carry") from error
