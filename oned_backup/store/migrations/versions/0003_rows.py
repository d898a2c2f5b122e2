"""What lists show, beside each document; lists and imports of many VMs find their rows by an index."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column, empty: `Store.open` fills it. The index covers what lists ask of restore points."""
    op.add_column("documents", sa.Column("row", sa.Text, nullable=False, server_default="{}"))
    op.create_index("documents_by_uuid", "documents", ["kind", "uuid"])
    op.drop_index("backups_by_vm", "backups")
    op.create_index(
        "backups_by_vm",
        "backups",
        ["vm_id", "image_id", "state", "stored_at", "verified_at", "increment_id", "backup_id"],
    )
