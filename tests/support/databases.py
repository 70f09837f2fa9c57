"""Empty stores for tests: SQLite, and PostgreSQL where LAMELLA_TEST_STORE names one."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from lamella.service.database import Database

SERVER = os.environ.get("LAMELLA_TEST_STORE")
URLS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.skipif(SERVER is None, reason="no PostgreSQL given"))]


def open_database(kind: str, folder: Path) -> Database:
    if kind == "sqlite":
        return Database(str(folder / f"{uuid.uuid4().hex}.db"))
    name = f"t{uuid.uuid4().hex[:12]}"
    server = create_engine(str(SERVER), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    server.dispose()
    return Database(f"{str(SERVER).rpartition('/')[0]}/{name}")
