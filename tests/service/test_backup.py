"""A copy of the store is whole, whatever the service does meanwhile, and comes back."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from lamella.errors import UserError
from lamella.service.backup import backup, restore
from lamella.service.paths import ADDRESS
from support.service import new_run, service_in


def test_a_copy_comes_back(tmp_path: Path) -> None:
    home = tmp_path / "home"
    service = service_in(home)
    first, _ = service.store.create(new_run(), None, {}, 0)
    assert backup(home, tmp_path / "copy.db") == 1
    second, _ = service.store.create(new_run(), None, {}, 0)
    service.store.database.close()
    with pytest.raises(UserError, match="exists; give another file"):
        backup(home, tmp_path / "copy.db")
    assert restore(home, tmp_path / "copy.db") == 1
    again = service_in(home)
    assert [run.id for run in again.store.runs(limit=10)] == [first.id]
    again.store.database.close()
    with sqlite3.connect(home / "lamella.db.before") as before:
        assert {row[0] for row in before.execute("SELECT id FROM runs")} == {first.id, second.id}


def test_what_is_no_copy_changes_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    service = service_in(home)
    service.store.create(new_run(), None, {}, 0)
    backup(home, tmp_path / "copy.db")
    whole = (tmp_path / "copy.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.db").write_text("no store")
    with sqlite3.connect(tmp_path / "newer.db") as newer, sqlite3.connect(tmp_path / "copy.db") as copy:
        copy.backup(newer)
        newer.execute("UPDATE alembic_version SET version_num = '9999'")
    for name, message in (("cut", "damaged"), ("text", "no store"), ("newer", "9999"), ("none", "there is no file")):
        with pytest.raises(UserError, match=message):
            restore(home, tmp_path / f"{name}.db")
    (home / ADDRESS).touch()
    with pytest.raises(UserError, match="a service runs"):
        restore(home, tmp_path / "copy.db")
    assert len(service.store.runs(limit=10)) == 1
    assert not (home / "lamella.db.before").exists()
    with pytest.raises(UserError, match="there is no store"):
        backup(tmp_path / "elsewhere", tmp_path / "other.db")
