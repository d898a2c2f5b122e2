"""Documents by kind and id, each with a version: who writes must have read the newest.

Lists take the row that is kept beside each document (`model.rows`), so that no XML is read for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from oned_backup import xmldoc
from oned_backup.errors import Conflict, InvalidInput, NotFound
from oned_backup.model import rows as list_rows
from oned_backup.model.vm import Vm
from oned_backup.store.database import Session
from oned_backup.store.schema import documents, meta, sequences

#: the kinds of documents and the id of the first; datastores below 100 are OpenNebula's own
FIRST_IDS = {"vm": 0, "image": 0, "host": 0, "datastore": 100}

#: the fact of the installation that says which version made the rows
_ROWS = "rows"

_SEARCHABLE = ("name", "uuid", "state", "host_id", "vm_id", "datastore_id")


@dataclass(frozen=True)
class Versioned:
    """A document as it was read; `version` is what an update must name."""

    element: xmldoc.Element
    version: int


# Built once: making a statement takes longer than running it.
_THIS = (documents.c.kind == sa.bindparam("of_kind")) & (documents.c.id == sa.bindparam("this"))
_GET = sa.select(documents.c.xml, documents.c.version).where(_THIS)
_CHANGE = documents.update().where(_THIS)
_UPDATE = _CHANGE.where(documents.c.version == sa.bindparam("read"))
_NEW = documents.insert()
_NEXT_ID = (
    sqlite.insert(sequences)
    .on_conflict_do_update(index_elements=["kind"], set_={"next_id": sequences.c.next_id + 1})
    .returning(sequences.c.next_id)
)
_DOUBLE_DOMAIN = sa.select(documents.c.id).where(
    # in the words of the partial index, so that it is used
    sa.text("kind = 'vm' AND uuid <> ''"),
    documents.c.id != sa.bindparam("this"),
    documents.c.host_id == sa.bindparam("on_host"),
    documents.c.uuid == sa.bindparam("of_uuid"),
)
_DOUBLE_NAME = sa.select(documents.c.id).where(
    documents.c.kind == sa.bindparam("of_kind"),
    documents.c.id != sa.bindparam("this"),
    documents.c.name == sa.bindparam("of_name"),
)


class Documents:
    """The documents' part of a store or transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def create(self, kind: str, build: Callable[[int], xmldoc.Element]) -> xmldoc.Element:
        """The new document that `build` makes for the next free id; `Conflict` if its name is taken."""
        _check(kind)
        with self._session.write() as connection:
            document_id = _next_id(connection, kind)
            element = build(document_id)
            row = {"kind": kind, "id": document_id, "version": 1, **_columns(kind, document_id, element)}
            _refuse_double(connection, row)
            connection.execute(_NEW, row)
        return element

    def get(self, kind: str, document_id: int) -> Versioned:
        """The document; `NotFound` if there is none."""
        _check(kind)
        with self._session.read() as connection:
            return _get(connection, kind, document_id)

    def find(self, kind: str, **columns: str | int) -> list[Versioned]:
        """All documents of a kind, by id, that have these values in the searchable columns.

        The columns: name, uuid, state, host_id, vm_id, datastore_id.
        """
        return [
            Versioned(xmldoc.parse(row.xml, what=kind), row.version)
            for row in self._select(("id", "xml", "version"), kind, columns)
        ]

    def rows(self, kind: str, **columns: str | int) -> list[dict[str, Any]]:
        """What lists show of the documents that `find` would give: see `model.rows`."""
        return [json.loads(row.row) for row in self._select(("id", "row"), kind, columns)]

    def _select(
        self, wanted: tuple[str, ...], kind: str, columns: Mapping[str, str | int]
    ) -> list[sa.Row[Any]]:
        _check(kind)
        for name in columns.keys() - set(_SEARCHABLE):
            raise InvalidInput(f"{kind}: cannot search by {name}", hint=f"Use {', '.join(_SEARCHABLE)}.")
        values = {"of_kind": kind, **{f"of_{name}": value for name, value in columns.items()}}
        with self._session.read() as connection:
            found = connection.execute(_search(wanted, tuple(columns)), values)
            # Sorted here: asked to, SQLite would walk the primary key instead of the column's index.
            return sorted(found, key=lambda row: row.id)

    def update(self, kind: str, document_id: int, version: int, element: xmldoc.Element) -> Versioned:
        """Replace the document that was read as `version`; `Conflict` if it has changed since."""
        _check(kind)
        row = {"kind": kind, "id": document_id, **_columns(kind, document_id, element)}
        with self._session.write() as connection:
            _refuse_double(connection, row)
            this = {"of_kind": kind, "this": document_id, "read": version}
            changed = connection.execute(_UPDATE, {**this, **row, "version": version + 1})
            if changed.rowcount != 1:
                _refuse_stale(connection, kind, document_id, version)
        return Versioned(element, version + 1)

    def change(
        self, kind: str, document_id: int, edit: Callable[[xmldoc.Element], xmldoc.Element]
    ) -> xmldoc.Element:
        """Read, `edit` and write a document in one transaction; what is stored now."""
        with self._session.write() as connection:
            read = _get(connection, kind, document_id)
            element = edit(read.element)
            row = {"kind": kind, "id": document_id, **_columns(kind, document_id, element)}
            _refuse_double(connection, row)
            this = {"of_kind": kind, "this": document_id}
            connection.execute(_CHANGE, {**this, **row, "version": read.version + 1})
        return element

    def delete(self, kind: str, document_id: int, version: int | None = None) -> None:
        """Remove the document; `Conflict` if it is no longer at `version`, `NotFound` if not there."""
        _check(kind)
        with self._session.write() as connection:
            query = documents.delete().where(documents.c.kind == kind, documents.c.id == document_id)
            if version is not None:
                query = query.where(documents.c.version == version)
            if connection.execute(query).rowcount != 1:
                _refuse_stale(connection, kind, document_id, version)


@cache
def _search(wanted: tuple[str, ...], columns: tuple[str, ...]) -> sa.Select[Any]:
    query = sa.select(*(documents.c[name] for name in wanted))
    query = query.where(documents.c.kind == sa.bindparam("of_kind"))
    return query.where(*(documents.c[name] == sa.bindparam(f"of_{name}") for name in columns))


def _check(kind: str) -> None:
    if kind not in FIRST_IDS:
        raise InvalidInput(f"there are no documents of kind '{kind}'")


def _get(connection: sa.Connection, kind: str, document_id: int) -> Versioned:
    row = connection.execute(_GET, {"of_kind": kind, "this": document_id}).one_or_none()
    if row is None:
        hint = f"`oned-backup {kind} list` shows what there is."
        raise NotFound(f"there is no {'VM' if kind == 'vm' else kind} {document_id}", hint=hint)
    return Versioned(xmldoc.parse(row.xml, what=f"{kind} {document_id}"), row.version)


def _next_id(connection: sa.Connection, kind: str) -> int:
    next_id = connection.execute(_NEXT_ID, {"kind": kind, "next_id": FIRST_IDS[kind] + 1}).scalar_one()
    return int(next_id) - 1


def _columns(kind: str, document_id: int, element: xmldoc.Element) -> dict[str, Any]:
    """The row's values that are taken from the document."""
    if element.tag != kind.upper() or xmldoc.integer(element, "ID", -1) != document_id:
        found = f"{element.tag} {xmldoc.text(element, 'ID')}"
        raise InvalidInput(f"the document of {kind} {document_id} is {found}")
    columns: dict[str, Any] = dict.fromkeys(_SEARCHABLE)
    columns["xml"] = xmldoc.serialize(element)
    columns["row"] = _row(kind, element)
    columns["name"] = element.findtext("NAME", "")
    columns["state"] = xmldoc.integer(element, "STATE")
    if kind == "vm":
        vm = Vm(element)
        columns |= {"uuid": vm.uuid, "host_id": vm.host_id}
    if kind == "image":
        columns["vm_id"] = xmldoc.integer(element, "VMS/ID", -1)
        columns["datastore_id"] = xmldoc.integer(element, "DATASTORE_ID")
    return columns


def _row(kind: str, element: xmldoc.Element) -> str:
    return json.dumps(list_rows.row(kind, element), ensure_ascii=False, separators=(",", ":"))


def refresh_rows(session: Session) -> None:
    """Make the rows again that another version of `model.rows` has made."""
    version = str(list_rows.VERSION)
    with session.write() as connection:
        made_by = connection.execute(sa.select(meta.c.value).where(meta.c.key == _ROWS)).scalar_one_or_none()
        if made_by == version:
            return
        keys = connection.execute(sa.select(documents.c.kind, documents.c.id)).all()
        for kind, document_id in keys:
            row = _row(kind, _get(connection, kind, document_id).element)
            this = (documents.c.kind == kind) & (documents.c.id == document_id)
            connection.execute(documents.update().where(this).values(row=row))
        connection.execute(meta.delete().where(meta.c.key == _ROWS))
        connection.execute(meta.insert().values(key=_ROWS, value=version))


def _refuse_double(connection: sa.Connection, row: dict[str, Any]) -> None:
    """`Conflict` in words, where the unique indexes would only name columns."""
    if row["kind"] in {"host", "datastore"}:
        query = _DOUBLE_NAME
        values = {"of_kind": row["kind"], "this": row["id"], "of_name": row["name"]}
        text = "{kind} {taken} is already named '{name}'"
    elif row["kind"] == "vm" and row["uuid"]:
        query = _DOUBLE_DOMAIN
        values = {"this": row["id"], "on_host": row["host_id"], "of_uuid": row["uuid"]}
        text = "domain {uuid} on host {host_id} is VM {taken} already"
    else:
        return
    taken = connection.execute(query, values).scalars().first()
    if taken is not None:
        raise Conflict(text.format(**row, taken=taken))


def _refuse_stale(connection: sa.Connection, kind: str, document_id: int, version: int | None) -> None:
    stored = _get(connection, kind, document_id).version
    raise Conflict(
        f"{kind} {document_id} was changed meanwhile: version {version} was read, {stored} is stored",
        hint="Read it again and repeat the change.",
    )
