"""Validates documents against OpenNebula's own schemas."""

from functools import cache
from pathlib import Path

from lxml import etree

from oned_backup import xmldoc

_SCHEMAS = Path(__file__).parents[3] / "share" / "schema" / "opennebula"
_NAMESPACE = "http://opennebula.org/XMLSchema"


@cache
def _schema(name: str) -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(_SCHEMAS / f"{name}.xsd"))


def assert_valid(element: xmldoc.Element) -> None:
    """Fails with the schema's message if a VM, IMAGE, DATASTORE or HOST document is not valid."""
    qualified = xmldoc.copy(element)
    for child in qualified.iter():
        child.tag = f"{{{_NAMESPACE}}}{child.tag}"
    _schema(str(element.tag).lower()).assertValid(qualified)
