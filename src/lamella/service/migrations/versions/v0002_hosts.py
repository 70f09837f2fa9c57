"""The hosts that share a store, and when the scheduler of each was last at work."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "hosts", sa.Column("host", sa.String(255), primary_key=True), sa.Column("looked", sa.Float, nullable=False)
    )
