"""Brings a database to this version's schema, all in one transaction."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import sqlalchemy as sa

from oned_backup.errors import Misconfigured


def upgrade(connection: sa.Connection) -> None:
    """Apply the migrations that are missing; `Misconfigured` if a newer version made the database."""
    with resources.as_file(resources.files(__package__)) as folder:
        known = {path.name.partition("_")[0] for path in folder.glob("versions/[0-9]*.py")}
        current = _current(connection)
        if current is not None and current not in known:
            raise Misconfigured(
                f"database schema {current} was made by a newer version, this one knows {max(known)}",
                hint="Install that version again; a database is not taken back to an older schema.",
            )
        if current != max(known):
            _migrate(connection, folder)


def _current(connection: sa.Connection) -> str | None:
    """The revision that Alembic has noted in the database; None in a new one."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar_one_or_none()
    return None if found is None else str(found)


def _migrate(connection: sa.Connection, folder: Path) -> None:
    from alembic import command  # noqa: PLC0415 - takes long to load, and is hardly ever needed
    from alembic.config import Config  # noqa: PLC0415

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    command.upgrade(config, "head")
