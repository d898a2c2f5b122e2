"""Brings a database to this version's schema, all in one transaction."""

from __future__ import annotations

from importlib import resources

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from oned_backup.errors import Misconfigured


def upgrade(connection: sa.Connection) -> None:
    """Apply the migrations that are missing; `Misconfigured` if a newer version made the database."""
    config = Config()
    with resources.as_file(resources.files(__package__)) as folder:
        config.set_main_option("script_location", str(folder).replace("%", "%%"))
        script = ScriptDirectory.from_config(config)
        known = [revision.revision for revision in script.walk_revisions()]
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and current not in known:
            raise Misconfigured(
                f"database schema {current} was made by a newer version, this one knows {known[0]}",
                hint="Install that version again; a database is not taken back to an older schema.",
            )
        if current != known[0]:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
