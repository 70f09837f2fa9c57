"""The tables, on SQLite and PostgreSQL alike. Times are seconds since 1970. Imports no torch.

A change here needs a file in migrations/versions/, and its number in `HEAD`; a test holds both equal.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from lamella.service.states import TERMINAL

HEAD = "0002"
"""The newest migration."""
metadata = MetaData()
Number = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only INTEGER keys
ENDED = ", ".join(f"'{state}'" for state in sorted(TERMINAL))

runs = Table(
    "runs", metadata,
    Column("seq", Number, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("kind", String(20), nullable=False),
    Column("name", String(200), nullable=False),
    Column("user", String(100), nullable=False),
    Column("state", String(20), nullable=False),
    Column("desired", String(20), nullable=False),
    Column("priority", Integer, nullable=False),
    Column("executor", String(20), nullable=False),
    Column("spec", JSON, nullable=False),  # the submission, checked
    Column("out", Text),  # what it writes; None: nothing
    Column("gpus", Integer, nullable=False),
    Column("cores", Integer, nullable=False),
    Column("failure", String(20)),
    Column("reason", Text, nullable=False),
    Column("attempt", Integer, nullable=False),  # attempts so far
    Column("fruitless", Integer, nullable=False),  # of them, since the last new checkpoint
    Column("not_before", Float, nullable=False),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("progress", JSON, nullable=False),
    Column("parent", String(40)),
    Index("runs_by_state", "state", "user", "priority"),
    Index("one_writer", "out", unique=True, sqlite_where=text(f"state NOT IN ({ENDED})"),
          postgresql_where=text(f"state NOT IN ({ENDED})")),
    sqlite_autoincrement=True,
)  # fmt: skip
attempts = Table(
    "attempts", metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("run", String(40), ForeignKey("runs.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("host", String(255), nullable=False),  # whose scheduler looks after it
    Column("handle", JSON, nullable=False),  # what the executor knows it by
    Column("devices", JSON, nullable=False),  # GPUs of this machine
    Column("started", Float, nullable=False),
    Column("ended", Float),
    Column("code", Integer),
    Column("failure", String(20)),
    Column("reason", Text, nullable=False),
    Column("saves", Integer, nullable=False),  # checkpoints of the run when it began
    Column("signalled", Float),
    UniqueConstraint("run", "number"),
    sqlite_autoincrement=True,
)  # fmt: skip
events = Table(
    "events", metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("run", String(40), ForeignKey("runs.id"), nullable=False),
    Column("time", Float, nullable=False),
    Column("event", String(40), nullable=False),
    Column("state", String(20)),  # after it
    Column("data", JSON, nullable=False),
    Index("events_of_run", "run", "id"),
    sqlite_autoincrement=True,
)  # fmt: skip
read_events = Table(  # how far the events that a training run writes were taken over
    "read_events", metadata,
    Column("run", String(40), ForeignKey("runs.id"), primary_key=True),
    Column("file", String(400), primary_key=True),
    Column("offset", Number, nullable=False),
)  # fmt: skip
hosts = Table(  # the machines whose schedulers share the store
    "hosts", metadata,
    Column("host", String(255), primary_key=True),
    Column("looked", Float, nullable=False),  # when its scheduler was last at work
)  # fmt: skip
idempotency = Table(
    "idempotency", metadata,
    Column("user", String(100), primary_key=True),
    Column("key", String(200), primary_key=True),
    Column("body", String(64), nullable=False),  # its SHA-256
    Column("run", String(40), ForeignKey("runs.id"), nullable=False),
    Column("created", Float, nullable=False),
)  # fmt: skip
api_keys = Table(
    "api_keys", metadata,
    Column("id", String(16), primary_key=True),
    Column("user", String(100), nullable=False),
    Column("hash", String(64), nullable=False),  # SHA-256 of the secret: 256 random bits need no slow hash
    Column("scopes", JSON, nullable=False),
    Column("run", String(40)),  # None: all of the user's; else this one alone
    Column("created", Float, nullable=False),
    Column("expires", Float),
    Column("revoked", Float),
)  # fmt: skip
audit = Table(
    "audit", metadata,
    Column("id", Number, primary_key=True, autoincrement=True),
    Column("time", Float, nullable=False),
    Column("user", String(100), nullable=False),
    Column("key", String(16)),
    Column("action", String(40), nullable=False),
    Column("run", String(40)),
    Column("data", JSON, nullable=False),
    sqlite_autoincrement=True,
)  # fmt: skip
