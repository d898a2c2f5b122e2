"""Operations that wait for their next attempt."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the time before which an operation is not claimed."""
    op.add_column("operations", sa.Column("not_before", sa.Float))
