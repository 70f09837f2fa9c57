"""The connection to the store: SQLite in a file, or PostgreSQL by URL; and its schema. Imports no torch.

Writers wait for one another, on SQLite by BEGIN IMMEDIATE and on PostgreSQL by an advisory lock. So the ids of events
appear in their order (a reader that asks for what came after an id misses nothing), and what a scheduler counted is
still true when it takes a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from lamella.errors import UserError
from lamella.service.schema import HEAD

BUSY_S = 10.0
CONNECT_S, SILENT_S = 5, 15
"""A PostgreSQL that has not answered for so long is gone."""
WRITER = 7_142_536_214  # the number of the advisory lock, for all who write to one database
SQLITE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
"""A new file is made under a name with one of these: a misspelled URL is no wish for a file of that name."""


class Unavailable(RuntimeError):
    """The store cannot answer now: locked for long, disk full, or the server of the database is gone."""


class _Cursor(Protocol):
    def execute(self, statement: str) -> object: ...

    def close(self) -> None: ...


class _Driver(Protocol):
    isolation_level: str | None

    def cursor(self) -> _Cursor: ...


class Database:
    """Transactions on the store.

    Args:
        url: of SQLAlchemy (`postgresql+psycopg://user@host/name`), or the path of a SQLite file.
        busy_s: a transaction waits so long for another one's end.

    Raises:
        UserError: a URL of another kind of database, or none at all.
    """

    def __init__(self, url: str, busy_s: float = BUSY_S):
        if "://" not in url and Path(url).suffix not in SQLITE_SUFFIXES and not Path(url).exists():
            raise UserError(
                f"the store {url!r} is no database; name postgresql+psycopg://USER@HOST/NAME, or a .db file"
            )
        self.url = url if "://" in url else f"sqlite:///{url}"
        _check_url(self.url)
        self.is_sqlite = self.url.startswith("sqlite")
        if self.is_sqlite and (file := self.url.removeprefix("sqlite:///")):
            Path(file).parent.mkdir(parents=True, exist_ok=True)
        connect: dict[str, object] = {"timeout": busy_s}
        if not self.is_sqlite:
            limits = f"-c lock_timeout={int(busy_s * 1000)}"  # a writer that hangs holds up no other for ever
            connect = {"connect_timeout": CONNECT_S, "tcp_user_timeout": 1000 * SILENT_S, "options": limits}
        self.engine: Engine = create_engine(
            self.url, pool_size=20, max_overflow=30, pool_pre_ping=not self.is_sqlite, connect_args=connect
        )
        if self.is_sqlite:
            event.listen(self.engine, "connect", _set_up_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads.

        Raises:
            Unavailable: see there.
        """
        with _told(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that others wait for.

        Raises:
            Unavailable: see there.
        """
        with _told(), self.engine.connect().execution_options(writes=True) as connection, connection.begin():
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": WRITER})
            yield connection

    def version(self) -> str | None:
        """The number of the schema; None of an empty database."""
        with self.reading() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()

    def migrate(self) -> None:
        """Bring the schema to what this version of lamella needs.

        Raises:
            UserError: a newer version has written it.
        """
        version = self.version()
        if version == HEAD:
            return
        if version is not None and version > HEAD:
            raise UserError(
                f"the store has schema {version}, this version of lamella knows up to {HEAD}; install a newer lamella"
            )
        from alembic import command  # only now: its import costs as much as the rest of a start
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self.writing() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, HEAD)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()


def _check_url(url: str) -> None:
    """UserError where the store cannot be there; the URL may hold a password, and is not repeated."""
    try:
        kind = make_url(url).get_backend_name()
        make_url(url).get_dialect()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise UserError("the store's URL cannot be read; write postgresql+psycopg://USER@HOST/NAME") from None
    if kind == "sqlite" and make_url(url).database in (None, "", ":memory:"):
        raise UserError("a store in memory is another one for every thread; name a file")
    if kind not in ("sqlite", "postgresql"):
        raise UserError(f"a store in {kind} is not supported; take a file, or postgresql+psycopg://USER@HOST/NAME")


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the database as Unavailable, but for those that say what is wrong with a row."""
    try:
        yield
    except OperationalError as error:
        raise Unavailable(f"the store does not answer: {error.orig}") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise Unavailable(f"the store does not answer: {error.orig}") from error
        raise


def _set_up_sqlite(connection: _Driver, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "journal_size_limit=67108864"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
