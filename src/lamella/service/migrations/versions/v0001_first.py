"""The first schema. Its tables are spelled out: they must not change with schema.py."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")
OPEN = "state NOT IN ('cancelled', 'failed', 'succeeded')"


def upgrade() -> None:
    """Make the tables of an empty database."""
    _runs()
    op.create_table(
        "attempts",
        sa.Column("id", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("run", sa.String(40), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("handle", sa.JSON, nullable=False),
        sa.Column("devices", sa.JSON, nullable=False),
        sa.Column("started", sa.Float, nullable=False),
        sa.Column("ended", sa.Float),
        sa.Column("code", sa.Integer),
        sa.Column("failure", sa.String(20)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("saves", sa.Integer, nullable=False),
        sa.Column("signalled", sa.Float),
        sa.UniqueConstraint("run", "number"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "events",
        sa.Column("id", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("run", sa.String(40), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("state", sa.String(20)),
        sa.Column("data", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("events_of_run", "events", ["run", "id"])
    op.create_table(
        "read_events",
        sa.Column("run", sa.String(40), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("file", sa.String(400), primary_key=True),
        sa.Column("offset", NUMBER, nullable=False),
    )
    _keys()


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("seq", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False, unique=True),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("user", sa.String(100), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("desired", sa.String(20), nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("executor", sa.String(20), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("out", sa.Text),
        sa.Column("gpus", sa.Integer, nullable=False),
        sa.Column("cores", sa.Integer, nullable=False),
        sa.Column("failure", sa.String(20)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("fruitless", sa.Integer, nullable=False),
        sa.Column("not_before", sa.Float, nullable=False),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("updated", sa.Float, nullable=False),
        sa.Column("started", sa.Float),
        sa.Column("ended", sa.Float),
        sa.Column("progress", sa.JSON, nullable=False),
        sa.Column("parent", sa.String(40)),
        sqlite_autoincrement=True,
    )
    op.create_index("runs_by_state", "runs", ["state", "user", "priority"])
    op.create_index(
        "one_writer", "runs", ["out"], unique=True, sqlite_where=sa.text(OPEN), postgresql_where=sa.text(OPEN)
    )


def _keys() -> None:
    op.create_table(
        "idempotency",
        sa.Column("user", sa.String(100), primary_key=True),
        sa.Column("key", sa.String(200), primary_key=True),
        sa.Column("body", sa.String(64), nullable=False),
        sa.Column("run", sa.String(40), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("user", sa.String(100), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("run", sa.String(40)),
        sa.Column("created", sa.Float, nullable=False),
        sa.Column("expires", sa.Float),
        sa.Column("revoked", sa.Float),
    )
    op.create_table(
        "audit",
        sa.Column("id", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("time", sa.Float, nullable=False),
        sa.Column("user", sa.String(100), nullable=False),
        sa.Column("key", sa.String(16)),
        sa.Column("action", sa.String(40), nullable=False),
        sa.Column("run", sa.String(40)),
        sa.Column("data", sa.JSON, nullable=False),
        sqlite_autoincrement=True,
    )
