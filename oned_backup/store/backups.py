"""Restore points: a row for each backup whose manifest is durable in its store."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from oned_backup.errors import Conflict, InvalidInput, NotFound
from oned_backup.store.database import Session
from oned_backup.store.schema import backups


class BackupState(StrEnum):
    """GOOD until verification finds otherwise; REMOVING once its files may be gone."""

    GOOD = "GOOD"
    BROKEN = "BROKEN"
    REMOVING = "REMOVING"


@dataclass(frozen=True)
class Backup:
    """A restore point; times in seconds since 1970, `manifest` is manifest.json's text."""

    backup_id: str
    image_id: int
    increment_id: int
    vm_id: int
    datastore_id: int
    manifest: str
    stored_at: float
    verified_at: float | None = None
    state: BackupState = BackupState.GOOD
    #: what verification found
    failure: str = ""


class Backups:
    """The restore points' part of a store or transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add_backup(self, backup: Backup) -> None:
        """Record a restore point; `Conflict` if the backup or the image's increment is known already."""
        with self._session.write() as connection:
            query = sa.select(backups.c.backup_id).where(
                (backups.c.backup_id == backup.backup_id)
                | ((backups.c.image_id == backup.image_id) & (backups.c.increment_id == backup.increment_id))
            )
            known = connection.execute(query).scalar()
            if known is not None:
                raise Conflict(
                    f"backup {backup.backup_id}, increment {backup.increment_id} of image"
                    f" {backup.image_id}: {known} is recorded already"
                )
            connection.execute(backups.insert().values(**vars(backup)))

    def backup(self, backup_id: str) -> Backup:
        """The restore point; `NotFound` if there is none."""
        with self._session.read() as connection:
            row = connection.execute(sa.select(backups).where(backups.c.backup_id == backup_id)).one_or_none()
        if row is None:
            raise NotFound(f"there is no backup {backup_id[:80]}")
        return _backup(row)

    def backups(
        self,
        *,
        image_id: int | None = None,
        vm_id: int | None = None,
        datastore_id: int | None = None,
        state: BackupState | None = None,
    ) -> list[Backup]:
        """The restore points that match, by image and increment."""
        wanted = {"image_id": image_id, "vm_id": vm_id, "datastore_id": datastore_id, "state": state}
        query = sa.select(backups)
        for name, value in wanted.items():
            if value is not None:
                query = query.where(backups.c[name] == value)
        with self._session.read() as connection:
            found = [_backup(row) for row in connection.execute(query)]
        return sorted(found, key=lambda backup: (backup.image_id, backup.increment_id))

    def mark_backup(
        self,
        backup_id: str,
        *,
        state: BackupState | None = None,
        verified_at: float | None = None,
        failure: str | None = None,
    ) -> None:
        """Change what is given; `NotFound` if there is no such restore point."""
        given = {"state": state, "verified_at": verified_at, "failure": failure}
        changes = {name: value for name, value in given.items() if value is not None}
        if not changes:
            raise InvalidInput(f"backup {backup_id}: nothing to change")
        with self._session.write() as connection:
            query = backups.update().where(backups.c.backup_id == backup_id).values(**changes)
            if connection.execute(query).rowcount != 1:
                raise NotFound(f"there is no backup {backup_id[:80]}")

    def forget_backup(self, backup_id: str) -> None:
        """Remove the row; no error if there is none."""
        with self._session.write() as connection:
            connection.execute(backups.delete().where(backups.c.backup_id == backup_id))


def _backup(row: sa.Row[tuple[object, ...]]) -> Backup:
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name
    return Backup(**{**values, "state": BackupState(values["state"])})
