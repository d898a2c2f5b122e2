"""The store: documents, restore points and the journal, alone or in one transaction.

    with Store.open(path) as store:
        with store.transaction() as tx:             committed at the end, or not at all
            image = tx.create("image", build)
            tx.add_backup(backup)
            tx.journal.end_step(operation_id, number, StepState.DONE)
        store.get("vm", 7)                          each call its own transaction

Threads share a `Store`. One transaction writes at a time; readers do not wait.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import sqlalchemy as sa

from oned_backup.store.backups import Backups
from oned_backup.store.database import Database, Session, open_database
from oned_backup.store.documents import Documents, refresh_rows
from oned_backup.store.journal import Journal
from oned_backup.store.schema import meta


class Transaction(Documents, Backups):
    """One write transaction: everything it does is committed together."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.journal = Journal(session)


class Store(Documents, Backups):
    """The open database; make it with `Store.open`, close it or use it as a context manager."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._database = database
        self.journal = Journal(database)
        #: 8 hex digits, random, the same for the life of the database
        self.installation = _installation(database)
        refresh_rows(database)

    @classmethod
    def open(cls, location: str | os.PathLike[str], *, now: Callable[[], float] = time.time) -> Store:
        """The store at a path or `sqlite:///` URL, created or migrated; see `open_database` for errors."""
        database = open_database(location, now)
        try:
            return cls(database)
        except BaseException:
            database.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A write transaction: committed when the block ends, rolled back if it raises."""
        with self._database.write() as connection:
            yield Transaction(_Joined(connection, self._database.now))

    @contextmanager
    def view(self) -> Iterator[Transaction]:
        """One committed state of everything, to read several things from; writing in it is a mistake."""
        with self._database.read() as connection:
            yield Transaction(_Viewed(connection, self._database.now))

    def close(self) -> None:
        """Close it; another process may open it then."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Joined:
    """A session in which all statements belong to one open transaction."""

    def __init__(self, connection: sa.Connection, now: Callable[[], float]) -> None:
        self.now = now
        self._connection = connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        yield self._connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        yield self._connection


class _Viewed(_Joined):
    """A session that only reads."""

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        raise RuntimeError("this is a view: use a transaction to write")
        yield


def _installation(database: Database) -> str:
    query = sa.select(meta.c.value).where(meta.c.key == "installation")
    with database.write() as connection:
        found = connection.execute(query).scalar_one_or_none()
        if found is None:
            found = secrets.token_hex(4)
            connection.execute(meta.insert().values(key="installation", value=found))
    return str(found)
