"""Restore points: a row for each backup whose manifest is durable in its store."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import sqlalchemy as sa

from oned_backup.errors import Conflict, InvalidInput, NotFound
from oned_backup.store.database import Session
from oned_backup.store.schema import backups

#: more than can be read before it is looked again
_MOST_DUE = 10_000


# Built once: making a statement takes longer than running it.
_GET = sa.select(backups).where(backups.c.backup_id == sa.bindparam("this"))
_NEW = backups.insert()
_DOUBLE = sa.select(backups.c.backup_id).where(
    (backups.c.backup_id == sa.bindparam("this"))
    | (
        (backups.c.image_id == sa.bindparam("of_image"))
        & (backups.c.increment_id == sa.bindparam("increment"))
    )
)


class BackupState(StrEnum):
    """GOOD until verification finds otherwise; REMOVING once its files may be gone."""

    GOOD = "GOOD"
    BROKEN = "BROKEN"
    REMOVING = "REMOVING"


@dataclass(frozen=True)
class RestorePoint:
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


@dataclass(frozen=True)
class Points:
    """What the restore points of a VM or an image come to; times in seconds since 1970, None: never."""

    points: int = 0
    broken: int = 0
    #: were never verified
    unproved: int = 0
    last_good_at: float | None = None
    #: of the good ones
    last_proved_at: float | None = None


@dataclass(frozen=True)
class NewestGood:
    """The newest good restore point of a VM."""

    backup_id: str
    image_id: int
    increment_id: int
    stored_at: float
    verified_at: float | None


@dataclass(frozen=True)
class ProofOfDatastore:
    """How many backups a datastore has, how many are proved or broken, and when the oldest proof was made."""

    backups: int
    proved: int
    broken: int
    oldest_proof_at: float | None


class Backups:
    """The restore points' part of a store or transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add_backup(self, backup: RestorePoint) -> None:
        """Record a restore point; `Conflict` if the backup or the image's increment is known already."""
        with self._session.write() as connection:
            this = {
                "this": backup.backup_id,
                "of_image": backup.image_id,
                "increment": backup.increment_id,
            }
            known = connection.execute(_DOUBLE, this).scalar()
            if known is not None:
                raise Conflict(
                    f"backup {backup.backup_id}, increment {backup.increment_id} of image"
                    f" {backup.image_id}: {known} is recorded already"
                )
            connection.execute(_NEW, vars(backup))

    def backup(self, backup_id: str) -> RestorePoint:
        """The restore point; `NotFound` if there is none."""
        with self._session.read() as connection:
            row = connection.execute(_GET, {"this": backup_id}).one_or_none()
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
    ) -> list[RestorePoint]:
        """The restore points that match, by image and increment."""
        given = {"image_id": image_id, "vm_id": vm_id, "datastore_id": datastore_id, "state": state}
        wanted = {f"of_{name}": value for name, value in given.items() if value is not None}
        with self._session.read() as connection:
            found = [_backup(row) for row in connection.execute(_search(tuple(wanted)), wanted)]
        return sorted(found, key=lambda backup: (backup.image_id, backup.increment_id))

    def points_of_vms(self, vm_id: int | None = None) -> dict[int, Points]:
        """What the restore points of each VM (or of one) come to, by its id; VMs without any are left out."""
        return self._points(backups.c.vm_id, vm_id)

    def points_of_images(self, vm_id: int | None = None) -> dict[int, Points]:
        """The same by image, of all VMs or of one."""
        return self._points(backups.c.image_id, vm_id)

    def newest_good(self, vm_id: int | None = None) -> dict[int, NewestGood]:
        """The newest good restore point of each VM (or of one) that has one, by its id."""
        c = backups.c
        # SQLite takes the other columns from the row that has the maximum (lang_select, "bare columns").
        query = sa.select(
            c.vm_id, c.backup_id, c.image_id, c.increment_id, sa.func.max(c.stored_at), c.verified_at
        )
        query = query.where(c.state == BackupState.GOOD).group_by(c.vm_id)
        with self._session.read() as connection:
            found = connection.execute(query.where(*_of_vm(vm_id))).all()
        return {row[0]: NewestGood(*row[1:]) for row in found}

    def _points(self, key: sa.Column[int], vm_id: int | None) -> dict[int, Points]:
        good = backups.c.state == BackupState.GOOD
        query = sa.select(
            key,
            sa.func.count(),
            sa.func.sum(sa.case((backups.c.state == BackupState.BROKEN, 1), else_=0)),
            sa.func.sum(sa.case((backups.c.verified_at.is_(None), 1), else_=0)),
            sa.func.max(sa.case((good, backups.c.stored_at))),
            sa.func.max(sa.case((good, backups.c.verified_at))),
        ).group_by(backups.c.vm_id, key)
        with self._session.read() as connection:
            return {row[0]: Points(*row[1:]) for row in connection.execute(query.where(*_of_vm(vm_id)))}

    def due_for_proof(self, datastore_id: int, *, now: float, every_s: float) -> list[str]:
        """The good backups of a datastore that are to be read again, those that wait longest first.

        That is when they are stored, and `every_s` seconds after they were proved.
        """
        proved = backups.c.verified_at.is_not(None) & (backups.c.verified_at <= now)
        since = sa.case((proved, backups.c.verified_at + every_s), else_=backups.c.stored_at)
        query = (
            sa.select(backups.c.backup_id)
            .where(backups.c.datastore_id == datastore_id, backups.c.state == BackupState.GOOD, since <= now)
            .order_by(since)
            .limit(_MOST_DUE)
        )
        with self._session.read() as connection:
            return list(connection.execute(query).scalars())

    def proof_of(self, datastore_id: int) -> ProofOfDatastore:
        """How far the backups of a datastore are proved."""
        proof = sa.case((backups.c.state == BackupState.GOOD, backups.c.verified_at))
        query = sa.select(
            sa.func.count(),
            sa.func.count(proof),
            sa.func.count().filter(backups.c.state == BackupState.BROKEN),
            sa.func.min(proof),
        ).where(backups.c.datastore_id == datastore_id)
        with self._session.read() as connection:
            return ProofOfDatastore(*connection.execute(query).one())

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

    def void_proofs(self, image_id: int) -> None:
        """Let no restore point of an image count as verified."""
        with self._session.write() as connection:
            query = backups.update().where(backups.c.image_id == image_id)
            connection.execute(query.values(verified_at=None))

    def forget_backup(self, backup_id: str) -> None:
        """Remove the row; no error if there is none."""
        with self._session.write() as connection:
            connection.execute(backups.delete().where(backups.c.backup_id == backup_id))


@cache
def _search(names: tuple[str, ...]) -> sa.Select[Any]:
    query = sa.select(backups)
    return query.where(*(backups.c[name.removeprefix("of_")] == sa.bindparam(name) for name in names))


def _of_vm(vm_id: int | None) -> tuple[sa.ColumnElement[bool], ...]:
    return () if vm_id is None else (backups.c.vm_id == vm_id,)


def _backup(row: sa.Row[tuple[object, ...]]) -> RestorePoint:
    values = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name
    return RestorePoint(**{**values, "state": BackupState(values["state"])})
