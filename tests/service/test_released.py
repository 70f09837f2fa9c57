"""Stores of released schemas go on as stores of this one, on SQLite, and on PostgreSQL where one is given."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select

from lamella.service import keys, migrations
from lamella.service.database import Database
from lamella.service.queue import Capacity, active, claim
from lamella.service.schema import HEAD, metadata
from lamella.service.store import Conflict, Store
from support.databases import URLS, open_database
from support.service import new_run

pytestmark = pytest.mark.faults
RELEASED = Path(__file__).parent / "released"
"""Stores of the schemas that were released, with data in them, as sqlite3's and PostgreSQL's own programs dump them."""
ROOM = Capacity(gpus=0, cores=4)


def load_released(database: Database, kind: str, version: str) -> None:
    """What a store of a released schema held, as the database's own program dumped it."""
    dump = (RELEASED / f"{version}.{kind}.sql").read_text()
    if kind == "sqlite":
        connection = sqlite3.connect(database.url.removeprefix("sqlite:///"))
        connection.executescript(dump)
        connection.close()
        return
    connection = database.engine.raw_connection()
    connection.cursor().execute(dump)
    connection.commit()
    connection.invalidate()  # a dump changes settings of its session


@pytest.mark.parametrize("kind", URLS)
@pytest.mark.parametrize("version", sorted({file.name.split(".")[0] for file in RELEASED.glob("*.sql")}))
def test_a_store_of_a_released_schema_goes_on(kind: str, version: str, tmp_path: Path) -> None:
    """Case 29: nothing is lost of what it held, and everything can be done with it afterwards."""
    database = open_database(kind, tmp_path)
    load_released(database, kind, version)
    assert database.version() == version
    tables = {name: table for name, table in metadata.tables.items() if inspect(database.engine).has_table(name)}

    def content() -> dict[str, list]:
        with database.reading() as connection:
            return {n: sorted(map(repr, connection.execute(select(t)).all())) for n, t in tables.items()}

    before = content()
    assert all(len(before[name]) > 0 for name in ("runs", "attempts", "events", "idempotency", "api_keys", "audit"))
    database.migrate()
    assert database.version() == HEAD
    assert content() == before
    database.migrate()  # once more changes nothing

    store = Store(database)
    by_name = {run.name: run for run in store.runs()}
    assert {name: run.state for name, run in by_name.items()} == {
        "done": "succeeded", "failed: ü <b>&'\"": "failed", "going": "running", "waiting": "queued",
        "paused": "paused", "cancelled": "cancelled",
    }  # fmt: skip
    done = by_name["done"]
    assert (done.progress["metrics"], by_name["paused"].parent) == ({"loss": 2.5}, done.id)
    assert store.create(new_run(), "key-1", {"a": 1}) == (done, False)
    assert [key.user for key in keys.listed(store)] == ["ada", "bob"]
    assert [run.id for run, _ in active(store, "node-1")] == [by_name["going"].id]
    assert store.events(run_id=done.id)[-1].state == "succeeded"
    last = store.last_event()
    assert store.wish(by_name["paused"].id, "running").state == "queued"
    assert store.last_event() == last + 1  # ids go on where they were
    with pytest.raises(Conflict, match="/lab/artifacts/going"):
        store.create(new_run(out="/lab/artifacts/going"))
    assert store.retry(by_name["cancelled"].id).state == "queued"
    taken = claim(store, "node-1", ROOM)
    assert taken is not None
    assert taken[0].id == by_name["waiting"].id
    database.close()


def test_every_released_schema_has_a_store_of_its_own() -> None:
    """Both of its kinds, and of no schema that there is not."""
    script = Config()
    script.set_main_option("script_location", str(Path(migrations.__file__).parent))
    numbers = {revision.revision for revision in ScriptDirectory.from_config(script).walk_revisions()}
    for kind in ("sqlite", "postgresql"):
        kept = {file.name.split(".")[0] for file in RELEASED.glob(f"*.{kind}.sql")}
        assert "0001" in kept
        assert kept <= numbers
