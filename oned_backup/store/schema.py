"""The tables. `migrations/` makes them; a test holds that both say the same.

Documents are XML text with a version that every change counts up; beside the
text there are columns only for what is looked for, and the row that lists show. At
most one operation of a lock is RUNNING: a unique index holds that, whatever the code does.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

#: facts of the installation: its id, and which version of `model.rows` made the rows
meta = sa.Table(
    "meta",
    metadata,
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("value", sa.String, nullable=False),
)

#: the id that the next document of a kind gets; ids are not used twice
sequences = sa.Table(
    "sequences",
    metadata,
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("next_id", sa.Integer, nullable=False),
)

documents = sa.Table(
    "documents",
    metadata,
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("uuid", sa.String),
    sa.Column("state", sa.Integer),
    sa.Column("host_id", sa.Integer),
    sa.Column("vm_id", sa.Integer),
    sa.Column("datastore_id", sa.Integer),
    sa.Column("xml", sa.Text, nullable=False),
    #: JSON, made of the document; see `model.rows`
    sa.Column("row", sa.Text, nullable=False, server_default="{}"),
    sa.Index("documents_by_name", "kind", "name"),
    sa.Index("documents_by_uuid", "kind", "uuid"),
    sa.Index("documents_by_vm", "kind", "vm_id"),
    sa.Index("documents_by_datastore", "kind", "datastore_id"),
    sa.Index(
        "documents_unique_name",
        "kind",
        "name",
        unique=True,
        sqlite_where=sa.text("kind IN ('host', 'datastore')"),
    ),
    sa.Index(
        "documents_unique_domain",
        "host_id",
        "uuid",
        unique=True,
        sqlite_where=sa.text("kind = 'vm' AND uuid <> ''"),
    ),
)

backups = sa.Table(
    "backups",
    metadata,
    sa.Column("backup_id", sa.String, primary_key=True),
    sa.Column("image_id", sa.Integer, nullable=False),
    sa.Column("increment_id", sa.Integer, nullable=False),
    sa.Column("vm_id", sa.Integer, nullable=False),
    sa.Column("datastore_id", sa.Integer, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("stored_at", sa.Float, nullable=False),
    sa.Column("verified_at", sa.Float),
    sa.Column("failure", sa.Text, nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
    # covers what lists ask, so that they do not read the manifests
    sa.Index(
        "backups_by_vm",
        "vm_id",
        "image_id",
        "state",
        "stored_at",
        "verified_at",
        "increment_id",
        "backup_id",
    ),
    sa.Index("backups_by_datastore", "datastore_id"),
    sa.UniqueConstraint("image_id", "increment_id", name="backups_unique_increment"),
)

operations = sa.Table(
    "operations",
    metadata,
    sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String, nullable=False, unique=True),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("lock", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("cancel_requested", sa.Boolean(create_constraint=False), nullable=False),
    sa.Column("vm_id", sa.Integer),
    sa.Column("image_id", sa.Integer),
    sa.Column("datastore_id", sa.Integer),
    sa.Column("arguments", sa.Text, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("error", sa.Text, nullable=False),
    sa.Column("queued_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("ended_at", sa.Float),
    sa.Column("not_before", sa.Float),
    sa.Index("operations_by_state", "state", "sequence"),
    sa.Index("operations_by_vm", "vm_id", "sequence"),
    sa.Index(
        "operations_by_datastore",
        "datastore_id",
        "kind",
        "sequence",
        sqlite_where=sa.text("datastore_id IS NOT NULL"),
    ),
    sa.Index(
        "operations_one_running_per_lock",
        "lock",
        unique=True,
        sqlite_where=sa.text("state = 'RUNNING'"),
    ),
    sqlite_autoincrement=True,
)

steps = sa.Table(
    "steps",
    metadata,
    sa.Column("operation_id", sa.String, sa.ForeignKey("operations.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("result", sa.Text, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("ended_at", sa.Float),
)
