"""The first schema: documents, restore points and the operation journal."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables. Spelled out, because `schema.py` will change and this must not."""
    op.create_table(
        "meta",
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
    )
    op.create_table(
        "sequences",
        sa.Column("kind", sa.String, primary_key=True),
        sa.Column("next_id", sa.Integer, nullable=False),
    )
    _documents()
    _backups()
    _operations()


def _documents() -> None:
    op.create_table(
        "documents",
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
    )
    op.create_index("documents_by_name", "documents", ["kind", "name"])
    op.create_index("documents_by_vm", "documents", ["kind", "vm_id"])
    op.create_index("documents_by_datastore", "documents", ["kind", "datastore_id"])
    named = sa.text("kind IN ('host', 'datastore')")
    op.create_index(
        "documents_unique_name",
        "documents",
        ["kind", "name"],
        unique=True,
        sqlite_where=named,
        postgresql_where=named,
    )
    domains = sa.text("kind = 'vm' AND uuid <> ''")
    op.create_index(
        "documents_unique_domain",
        "documents",
        ["host_id", "uuid"],
        unique=True,
        sqlite_where=domains,
        postgresql_where=domains,
    )


def _backups() -> None:
    op.create_table(
        "backups",
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
        sa.UniqueConstraint("image_id", "increment_id", name="backups_unique_increment"),
    )
    op.create_index("backups_by_vm", "backups", ["vm_id"])
    op.create_index("backups_by_datastore", "backups", ["datastore_id"])


def _operations() -> None:
    op.create_table(
        "operations",
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
        sqlite_autoincrement=True,
    )
    op.create_index("operations_by_state", "operations", ["state", "sequence"])
    op.create_index("operations_by_vm", "operations", ["vm_id", "sequence"])
    running = sa.text("state = 'RUNNING'")
    op.create_index(
        "operations_one_running_per_lock",
        "operations",
        ["lock"],
        unique=True,
        sqlite_where=running,
        postgresql_where=running,
    )
    op.create_table(
        "steps",
        sa.Column("operation_id", sa.String, sa.ForeignKey("operations.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("result", sa.Text, nullable=False),
        sa.Column("started_at", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float),
    )
