"""The store: every change is one compare-and-swap with an event, on SQLite, and on PostgreSQL where one is given.

`scripts/with_postgres.py` starts a PostgreSQL and sets LAMELLA_TEST_STORE for these tests.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule
from sqlalchemy import event, inspect, text

from lamella.errors import UserError
from lamella.service import migrations
from lamella.service.database import Database, Unavailable
from lamella.service.queue import Capacity, active, claim, in_state
from lamella.service.schema import HEAD, metadata
from lamella.service.states import ACTIVE, NEXT, STATES, TERMINAL, before
from lamella.service.store import Conflict, NotFound, Quota, Store
from support.databases import URLS, open_database
from support.service import new_run

pytestmark = pytest.mark.faults
ROOM = Capacity(gpus=0, cores=4)


@pytest.fixture(params=URLS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    database = open_database(request.param, tmp_path)
    database.migrate()
    yield Store(database)
    database.close()


def test_the_migrations_make_the_tables_that_the_code_expects(store: Store) -> None:
    script = Config()
    script.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(script).get_current_head() == HEAD == store.database.version()
    found = inspect(store.database.engine)
    for table in metadata.tables.values():
        assert {c["name"] for c in found.get_columns(table.name)} == {c.name for c in table.columns}
        indexes = {index["name"] for index in found.get_indexes(table.name)}
        assert {index.name for index in table.indexes} <= indexes


def test_a_newer_schema_is_refused(store: Store) -> None:
    """Case 29."""
    store.create(new_run())
    with store.database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(UserError, match="newer lamella"):
        store.database.migrate()
    assert store.database.version() == "9999"
    assert len(store.runs()) == 1


def test_fifty_submits_with_one_key_are_one_run(store: Store) -> None:
    """Case 19."""
    with ThreadPoolExecutor(50) as pool:
        made = list(pool.map(lambda _: store.create(new_run(), "key", {"a": 1}), range(50)))
    assert len({run.id for run, _ in made}) == 1
    assert sum(new for _, new in made) == 1
    assert len(store.runs()) == 1
    with pytest.raises(Conflict, match="another body"):
        store.create(new_run(), "key", {"a": 2})
    assert store.create(new_run("bob"), "key", {"a": 2})[1]  # keys are a user's own


def queued(store: Store, count: int, **values: object) -> list[str]:
    runs = [store.create(new_run(**values))[0] for _ in range(count)]
    for run in runs:
        assert store.move(run, "queued", "queued")
    return [run.id for run in runs]


def test_two_schedulers_start_each_run_once(store: Store) -> None:
    """Case 19."""
    ids = queued(store, 24)
    taken: list[str] = []
    lock = threading.Lock()

    def work(host: str) -> None:
        while (found := claim(store, host, Capacity(0, 1000))) is not None:
            with lock:
                taken.append(found[0].id)

    threads = [threading.Thread(target=work, args=(f"host-{i % 2}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(ids)
    for run_id in ids:
        assert [attempt.number for attempt in store.attempts(run_id)] == [1]


def test_the_queue_goes_by_priority_then_by_who_has_least_then_by_age(store: Store) -> None:
    first, second, third = queued(store, 3, user="ada")
    (bobs,) = queued(store, 1, user="bob")
    (urgent,) = queued(store, 1, user="ada", priority=5)
    order = []
    for _ in range(4):
        taken = claim(store, "here", ROOM)
        assert taken is not None
        order.append(taken[0].id)
    assert order == [urgent, bobs, first, second]
    assert claim(store, "here", ROOM) is None  # 4 cores are taken
    assert [run.id for run, _ in active(store, "here")] == sorted(order, key=[first, second, third, bobs, urgent].index)
    assert [run.id for run in in_state(store, "queued")] == [third]


def test_gpus_are_given_to_one_run_at_a_time(store: Store) -> None:
    one, _, three = queued(store, 3, gpus=2, cores=0)
    room = Capacity(gpus=4, cores=1)
    first, second = claim(store, "here", room), claim(store, "here", room)
    assert first is not None
    assert second is not None
    assert (first[1].devices, second[1].devices) == ([0, 1], [2, 3])
    assert claim(store, "here", room) is None
    run = store.get(one)
    assert store.move(run, "failed", "failed")
    third = claim(store, "here", room)
    assert third is not None
    assert (third[0].id, third[1].devices) == (three, [0, 1])


def test_one_folder_has_one_writer(store: Store) -> None:
    run, _ = store.create(new_run(out="/data/run"))
    with pytest.raises(Conflict, match="/data/run"):
        store.create(new_run(out="/data/run"))
    store.wish(run.id, "cancelled")
    other, _ = store.create(new_run(out="/data/run"))
    with pytest.raises(Conflict, match="another run"):
        store.retry(run.id)
    store.wish(other.id, "cancelled")
    assert store.retry(run.id).state == "queued"


def test_a_user_has_as_many_runs_as_allowed(store: Store) -> None:
    """Case 30."""
    run, _ = store.create(new_run(), limit=1)
    with pytest.raises(Quota):
        store.create(new_run(), limit=1)
    store.create(new_run("bob"), limit=1)
    store.wish(run.id, "cancelled")
    store.create(new_run(), limit=1)


@pytest.mark.slow
def test_cancel_races_success_and_one_of_them_stands(store: Store) -> None:
    """Case 20."""
    for _ in range(20):
        (run_id,) = queued(store, 1)
        taken = claim(store, "here", Capacity(0, 1000))
        assert taken is not None
        run = taken[0]
        with ThreadPoolExecutor(3) as pool:
            jobs = [
                pool.submit(store.wish, run_id, "cancelled"),
                pool.submit(store.move, run, "succeeded", "succeeded"),
            ]
            jobs.append(pool.submit(store.wish, run_id, "cancelled"))
            for job in jobs:
                job.result()
        after = store.get(run_id)
        assert after.state in ("succeeded", "cancelling")
        if after.state == "cancelling":  # its process had ended well all the same
            assert store.move(after, "succeeded", "succeeded")
        ends = [e.state for e in store.events(run_id=run_id) if e.state in TERMINAL]
        assert ends == ["succeeded"]
        assert store.wish(run_id, "cancelled").state == "succeeded"


@pytest.mark.slow
def test_events_come_in_the_order_of_their_ids_also_from_many_writers(store: Store) -> None:
    runs = [store.create(new_run())[0] for _ in range(8)]
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        last = 0
        while True:
            over = done.is_set()
            found = store.events(last)
            seen.extend(event.id for event in found)
            last = found[-1].id if found else last
            if over and not found:
                return

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.note(runs[i % 8].id, "note", {"i": i}), range(64)))
    done.set()
    reader.join()
    assert seen == sorted(seen)
    assert len(seen) == 8 + 64


def test_a_locked_store_is_waited_for_and_then_not_available(tmp_path: Path) -> None:
    """Case 29."""
    file = tmp_path / "s.db"
    Database(str(file)).migrate()
    store = Store(Database(str(file), busy_s=0.3))
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert store.runs() == []  # readers wait for nobody
    with pytest.raises(Unavailable, match="locked"):
        store.create(new_run())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.create, new_run())
        time.sleep(0.1)
        other.execute("ROLLBACK")
        assert waiting.result()[1]
    other.close()


@pytest.mark.parametrize("kind", URLS[1:])
def test_a_writer_that_hangs_holds_up_no_other_for_ever(kind: str, tmp_path: Path) -> None:
    """Case 29, on PostgreSQL: a server that was stopped in the middle of a transaction."""
    database = open_database(kind, tmp_path)
    database.migrate()
    store = Store(Database(str(database.url), busy_s=0.5))
    with database.writing():
        assert store.runs() == []  # readers wait for nobody
        with pytest.raises(Unavailable, match="lock timeout"):
            store.create(new_run())
    assert store.create(new_run())[1]


def test_a_full_disk_is_not_available_and_loses_nothing(tmp_path: Path) -> None:
    """Case 29: SQLite is told to take no page more."""
    database = Database(str(tmp_path / "s.db"))
    database.migrate()
    store = Store(database)
    store.create(new_run())

    with database.engine.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar()
    event.listen(database.engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count={pages}"))
    database.engine.dispose()
    with pytest.raises(Unavailable, match="full"):
        [store.create(new_run()) for _ in range(500)]
    assert len(store.runs(limit=500)) >= 1
    assert {run.state for run in store.runs(limit=500)} == {"validating"}


def test_every_state_is_reached_and_ends_are_left_by_retry_alone() -> None:
    for state in STATES:
        assert state == "validating" or before(state), state
        assert NEXT[state] <= set(STATES)
        if state in TERMINAL:
            assert NEXT[state] <= {"queued"}


class Life(RuleBasedStateMachine):
    """What people wish and what schedulers see, in any order: the events are a legal way, and tell the state."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
        self.store = Store(Database(f"{self.folder.name}/s.db"))
        metadata.create_all(self.store.database.engine)

    def teardown(self) -> None:
        self.store.database.close()
        self.folder.cleanup()

    @rule(target=ids, user=st.sampled_from(["ada", "bob"]), kind=st.sampled_from(["train", "convert"]))
    def submit(self, user: str, kind: str) -> str:
        return self.store.create(new_run(user, kind=kind))[0].id

    @rule()
    def start(self) -> None:
        for run in in_state(self.store, "validating"):
            self.store.move(run, "queued", "queued")
        claim(self.store, "here", ROOM)

    @rule(run_id=ids, desired=st.sampled_from(["cancelled", "paused", "running"]))
    def wish(self, run_id: str, desired: str) -> None:
        was = self.store.get(run_id)
        try:
            run = self.store.wish(run_id, desired)
        except Conflict:
            assert was.is_over or was.desired == "cancelled" or was.kind != "train"
            return
        assert was.is_over or run.desired == desired
        assert self.store.wish(run_id, desired) == run  # the same wish changes nothing

    @rule(run_id=ids)
    def retry(self, run_id: str) -> None:
        was = self.store.get(run_id)
        try:
            assert self.store.retry(run_id).state == "queued"
        except Conflict:
            assert was.state not in ("failed", "cancelled")

    @rule(run_id=ids, choice=st.integers(0, 20))
    def observe(self, run_id: str, choice: int) -> None:
        run = self.store.get(run_id)
        allowed = sorted(NEXT[run.state] - {"starting"})
        if run.state in ACTIVE and allowed:
            assert self.store.move(run, allowed[choice % len(allowed)], "seen")

    @rule(run_id=ids)
    def late(self, run_id: str) -> None:
        """Who knows an older state changes nothing."""
        run = self.store.get(run_id)
        if run.state in ("queued", "paused", "preempted"):
            assert self.store.wish(run_id, "cancelled").state == "cancelled"
            assert not self.store.move(run, "queued" if run.state != "queued" else "failed", "late")

    @invariant()
    def the_events_tell_the_state(self) -> None:
        for run in self.store.runs(limit=500):
            states = [e.state for e in self.store.events(run_id=run.id, limit=5000) if e.state]
            assert states[-1] == run.state
            for a, b in pairwise(states):
                assert a == b or b in NEXT[a], (a, b)

    @invariant()
    def no_more_than_the_machine_has(self) -> None:
        assert sum(run.cores for run, _ in active(self.store, "here")) <= ROOM.cores


Life.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLife = pytest.mark.slow(Life.TestCase)


def test_no_such_run(store: Store) -> None:
    with pytest.raises(NotFound, match="run-none"):
        store.get("run-none")
