"""Lists of runs in every order, a page at a time, and what runs have used."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lamella.service import queue
from lamella.service.context import Service
from lamella.service.database import Database
from lamella.service.listing import COLUMNS, Sort, Wanted
from lamella.service.queue import Capacity
from lamella.service.store import Run, Store
from support.service import new_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Seven runs of two users and three kinds; two names are the same."""
    database = Database(str(tmp_path / "store.db"))
    database.migrate()
    store = Store(database)
    for i, name in enumerate(("b", "a", "d", "a", "c", "E", "f%")):
        store.create(new_run(user="ada" if i % 2 else "bob", kind=("train", "convert", "verify")[i % 3], name=name))
    return store


def pages(store: Store, limit: int, wanted: Wanted) -> list[Run]:
    """All runs, a page at a time."""
    found: list[Run] = []
    while page := store.runs(found[-1].id if found else None, limit, wanted):
        found += page
    return found


@pytest.mark.parametrize(("sort", "ascending", "limit"), itertools.product(COLUMNS, (True, False), (1, 2, 3, 50)))
def test_pages_hold_every_run_once_in_order(store: Store, sort: Sort, ascending: bool, limit: int) -> None:
    found = pages(store, limit, Wanted(sort=sort, ascending=ascending))
    assert len({run.id for run in found}) == len(found) == store.count() == 7
    values = [getattr(run, COLUMNS[sort]) for run in found]
    assert values == sorted(values, reverse=not ascending)
    equals = [(a, b) for a, b in itertools.pairwise(found) if getattr(a, COLUMNS[sort]) == getattr(b, COLUMNS[sort])]
    assert all(a.seq > b.seq for a, b in equals)


def test_what_is_wanted_is_counted(store: Store) -> None:
    for wanted in (Wanted(user="ada"), Wanted(kind="verify"), Wanted(text="a"), Wanted(text="%"), Wanted(["queued"])):
        assert store.count(wanted) == len(pages(store, 2, wanted))
    assert store.count(Wanted(text="%")) == 1
    assert store.count(Wanted(["validating"], "train", "bob")) == 2


def test_only_attempts_count_as_used(store: Store) -> None:
    first, second = pages(store, 50, Wanted(sort="name", ascending=True))[:2]
    for run in (first, second):
        assert store.move(run, "queued", "queued")
    for _ in range(2):  # two attempts of the first, with a wait between them
        taken = queue.claim(store, "here", Capacity(0, 8), "local")
        assert taken is not None
    ids = [first.id, second.id]
    used = store.used(ids)
    assert {took for took, _ in used.values()} == {0.0}
    assert all(since is not None for _, since in used.values())
    (attempt,) = store.attempts(first.id)
    queue.change_attempt(store, attempt, ended=attempt.started + 90.0)
    assert store.used(ids)[first.id] == (pytest.approx(90.0), None)
    assert store.used(ids)[second.id][1] == store.attempts(second.id)[0].started
    assert store.used([]) == {}


def test_the_list_is_sorted_and_counted_over_http(client: TestClient, service: Service) -> None:
    for name in ("b", "a", "c"):
        service.store.create(new_run(name=name))
    answer = client.get("/v1/jobs?sort=name&ascending=true&limit=2&count=true").json()
    assert [run["name"] for run in answer["data"]] == ["a", "b"]
    assert answer["total"] == 3
    rest = client.get(f"/v1/jobs?sort=name&ascending=true&limit=2&after={answer['after']}").json()
    assert [run["name"] for run in rest["data"]] == ["c"]
    assert rest["after"] is None
    assert rest["total"] is None
    assert client.get("/v1/jobs?sort=size").status_code == 422
