"""Copies of a SQLite store, made while the service runs, and their return. Imports no torch."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from lamella.errors import UserError
from lamella.service.database import Database
from lamella.service.paths import ADDRESS
from lamella.service.schema import HEAD

STORE = "lamella.db"


def backup(home: Path, out: Path) -> int:
    """Write a whole copy of the store to a new file; the service may run meanwhile.

    Returns:
        Its runs.

    Raises:
        UserError: no store there, or a file that exists.
    """
    store = home / STORE
    if not store.is_file():
        raise UserError(f"there is no store {store}; name the service's --home (PostgreSQL has pg_dump)")
    if out.exists():
        raise UserError(f"{out} exists; give another file")
    if not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.absolute().parent}; make it first")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        _copy(store, unfinished)
        count = _runs(unfinished)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def restore(home: Path, file: Path) -> int:
    """Put a copy in the place of the store; the one that was there is kept beside it as lamella.db.before.

    Returns:
        Its runs.

    Raises:
        UserError: the service runs; no such file; no store, a damaged one, or one of a newer version.
    """
    if (home / ADDRESS).exists():
        raise UserError(f"a service runs on {home}, or was killed there; end it, and remove {home / ADDRESS}")
    if not file.is_file():
        raise UserError(f"there is no file {file}; `lamella backup` writes one")
    count = _runs(file)
    home.mkdir(parents=True, exist_ok=True)
    unfinished, store = home / f".{STORE}.{os.getpid()}", home / STORE
    try:
        _copy(file, unfinished)
        if store.exists():
            with closing(sqlite3.connect(store)) as old:  # so that all of it is in the one file that is kept
                old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            store.replace(home / f"{STORE}.before")
        for left in (f"{STORE}-wal", f"{STORE}-shm"):
            (home / left).unlink(missing_ok=True)
        unfinished.replace(store)
    finally:
        unfinished.unlink(missing_ok=True)
    Database(str(store)).migrate()
    return count


def _copy(store: Path, to: Path) -> None:
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as source, closing(sqlite3.connect(to)) as target:
        source.backup(target)


def _runs(file: Path) -> int:
    """The number of runs in a store that is whole."""
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
            (whole,) = store.execute("PRAGMA integrity_check").fetchone()
            (version,) = store.execute("SELECT version_num FROM alembic_version").fetchone()
            (count,) = store.execute("SELECT count(*) FROM runs").fetchone()
    except (sqlite3.Error, TypeError) as error:
        raise UserError(f"{file} is no store of lamella, or is damaged: {error}") from None
    if whole != "ok":
        raise UserError(f"{file} is damaged: {whole}; take an older copy")
    if version > HEAD:
        raise UserError(f"{file} has schema {version}, this version of lamella knows up to {HEAD}; install a newer one")
    return int(count)
