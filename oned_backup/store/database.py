"""The SQLite file: opened by one process at a time, migrated, written by one thread at a time.

What a transaction committed survives a power cut: `write` returns when it is on the
disk, and several threads' commits share the wait (`durable`). Readers see the last
committed state and never wait for the writer. Writers
queue on a lock in the process, so that SQLite's own (unfair) busy handling is
never what decides.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.pool import ConnectionPoolEntry

from oned_backup.errors import (
    Busy,
    Conflict,
    DataCorrupt,
    Misconfigured,
    NoSpace,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
    Unsupported,
)
from oned_backup.store.durable import CommitLog
from oned_backup.store.migrations.upgrade import upgrade

WRITE_WAIT_S = 30.0
_BUSY_TIMEOUT_MS = 10_000
_OTHERS_MAY_WRITE = 0o022


class Session(Protocol):
    """Where statements run: each in a transaction of its own, or all in one."""

    now: Callable[[], float]

    def read(self) -> AbstractContextManager[sa.Connection]:
        """A connection to read from."""

    def write(self) -> AbstractContextManager[sa.Connection]:
        """A connection to write to; committed, or part of a larger transaction, at the end."""


class Database:
    """An open database; a `Session` in which each use is its own transaction."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        """Open, create or migrate the file `path`; see `open_database`."""
        self.now = now
        self.path = path
        self._engine = _engine(path)
        self._lock_fd = _claim_file(path)
        self._writing = threading.Lock()
        self._writer: int | None = None
        self._log = CommitLog(path)
        try:
            with translated(path), self._begun("BEGIN IMMEDIATE") as connection:
                upgrade(connection)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection that sees one consistent, committed state."""
        with translated(self.path), self._begun("BEGIN") as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A connection in a write transaction: committed and durable at the end, rolled back on an exception.

        `Busy` if other threads kept writing for `WRITE_WAIT_S`.
        """
        self._log.check()
        thread = threading.get_ident()
        if self._writer == thread:
            raise RuntimeError("a transaction of this thread is open: use it instead of the store")
        if not self._writing.acquire(timeout=WRITE_WAIT_S):
            raise Busy(f"{self.path}: other threads have been writing for {WRITE_WAIT_S:.0f} s")
        try:
            self._writer = thread
            with translated(self.path), self._begun("BEGIN IMMEDIATE") as connection:
                yield connection
            written = self._log.committed()
        finally:
            self._writer = None
            self._writing.release()
        self._log.wait(written)

    @contextmanager
    def _begun(self, statement: str) -> Iterator[sa.Connection]:
        """A connection in a transaction begun by `statement`: committed at the end, or rolled back.

        Past SQLAlchemy: as a listener to its event each statement would look for further ones.
        """
        with self._engine.begin() as connection:
            connection.connection.cursor().execute(statement)
            yield connection

    def close(self) -> None:
        """Close all connections and let another process open the file; again is no error."""
        self._engine.dispose()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def open_database(location: str | os.PathLike[str], now: Callable[[], float]) -> Database:
    """The database at a path or `sqlite:///path` URL, migrated to this version's schema.

    The directory is created 0700, the file 0600. `Conflict` if another process
    has it open, `Misconfigured` if others may write the directory or a newer
    version made the file, `Unsupported` for databases of another kind.
    """
    text = os.fspath(location)
    if text.startswith("sqlite:///"):
        text = text.removeprefix("sqlite:///")
    elif "://" in text:
        raise Unsupported(f"database {text.partition('://')[0]}: only SQLite is supported")
    path = Path(text).absolute()
    try:
        return Database(path, now)
    except PermissionError as error:
        raise PermissionDenied(f"database {path}: {error.strerror}") from error
    except OSError as error:
        raise Unavailable(f"database {path}: {error.strerror}") from error


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn the database's exceptions into the project's."""
    try:
        yield
    except exc.IntegrityError as error:
        raise Conflict(f"the database refuses it: {error.orig}") from error
    except exc.TimeoutError as error:
        raise Busy(f"database {path}: too many readers") from error
    except (exc.DatabaseError, sqlite3.Error) as error:  # the second from `_begun`
        cause = error.orig if isinstance(error, exc.DatabaseError) else error
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        kind = {
            sqlite3.SQLITE_BUSY: Busy,
            sqlite3.SQLITE_LOCKED: Busy,
            sqlite3.SQLITE_FULL: NoSpace,
            sqlite3.SQLITE_CORRUPT: DataCorrupt,
            sqlite3.SQLITE_NOTADB: DataCorrupt,
            sqlite3.SQLITE_READONLY: PermissionDenied,
            sqlite3.SQLITE_PERM: PermissionDenied,
        }.get(code, Unavailable)
        raise kind(f"database {path}: {cause}", hint=_REMEDIES.get(kind)) from error


_REMEDIES: Mapping[type[OnedBackupError], str] = {
    NoSpace: "Make room there.",
    DataCorrupt: "Move the file away, start again, then `oned-backup datastore import` each store.",
}


def _claim_file(path: Path) -> int:
    """A descriptor that holds the lock of the database at `path`; the file exists afterwards."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.parent.stat().st_mode & _OTHERS_MAY_WRITE:
        raise Misconfigured(
            f"directory {path.parent} of the database can be written by others",
            hint=f"Run: chmod 700 {path.parent}",
        )
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock_fd = os.open(f"{path}.lock", flags, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(os.open(path, flags, 0o600))
    except BlockingIOError as error:
        os.close(lock_fd)
        raise Conflict(
            f"database {path} is in use by another daemon",
            hint="Stop it first, or give this one another state directory.",
        ) from error
    except BaseException:
        os.close(lock_fd)
        raise
    return lock_fd


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        pool_size=8,
        max_overflow=64,
        pool_timeout=WRITE_WAIT_S,
        pool_use_lifo=True,
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _entry: ConnectionPoolEntry) -> None:
        # Python's sqlite3 must not begin transactions by itself: `_begun` does
        connection.isolation_level = None
        for pragma in (
            f"busy_timeout = {_BUSY_TIMEOUT_MS}",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "foreign_keys = ON",
            "trusted_schema = OFF",
        ):
            connection.execute(f"PRAGMA {pragma}")

    return engine
