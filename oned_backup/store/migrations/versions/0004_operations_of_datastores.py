"""The operations of a datastore are found by an index: there are few among many of VMs."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the index; operations that name no datastore are not in it."""
    op.create_index(
        "operations_by_datastore",
        "operations",
        ["datastore_id", "kind", "sequence"],
        sqlite_where=sa.text("datastore_id IS NOT NULL"),
    )
