"""Runs, their attempts and their events. Every change of a state is one compare-and-swap with an event beside it.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import cast

from sqlalchemy import Connection, RowMapping, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.service.database import Database
from lamella.service.listing import Wanted, used
from lamella.service.schema import attempts, audit, events, idempotency, read_events, runs
from lamella.service.states import ACTIVE, NEXT, TERMINAL, Desired, State

KEEP_IDEMPOTENCY_S = 7 * 24 * 3600.0
ALL = Wanted()


class Conflict(UserError):
    """What was asked for does not go with what is there."""


class NotFound(UserError):
    """There is no such thing in the store."""


@dataclass(frozen=True)
class NewRun:
    """A submission as it is stored."""

    kind: str
    user: str
    spec: Json
    name: str = ""
    priority: int = 0
    executor: str = "local"
    out: str | None = None
    """The folder that it writes, as a full path; at most one run that has not ended may have it."""
    gpus: int = 0
    cores: int = 0
    parent: str | None = None


@dataclass(frozen=True)
class Run:
    """A run as the store has it; times in seconds since 1970."""

    seq: int
    id: str
    kind: str
    name: str
    user: str
    state: State
    desired: Desired
    priority: int
    executor: str
    spec: Json = field(repr=False)
    out: str | None
    gpus: int
    cores: int
    failure: str | None
    reason: str
    attempt: int
    """Attempts so far, the present one included."""
    fruitless: int
    """Attempts in a row that ended without a new checkpoint."""
    not_before: float
    created: float
    updated: float
    started: float | None
    ended: float | None
    progress: Json
    parent: str | None

    @property
    def is_over(self) -> bool:
        """Whether only a person's `retry` can make it go on."""
        return self.state in TERMINAL


@dataclass(frozen=True)
class Attempt:
    """One start of a run."""

    id: int
    run: str
    number: int
    host: str
    handle: Json
    devices: list[int]
    started: float
    ended: float | None
    code: int | None
    failure: str | None
    reason: str
    saves: int
    signalled: float | None


@dataclass(frozen=True)
class Event:
    """Something that happened to a run; ids only grow."""

    id: int
    run: str
    time: float
    event: str
    state: str | None
    data: Json


def as_run(row: RowMapping) -> Run:
    """A row of `runs`."""
    return Run(**cast(Json, dict(row)))


class Store:
    """What is known of all runs.

    Args:
        database: with the newest schema, see `Database.migrate`.
    """

    def __init__(self, database: Database):
        self.database = database

    # -- submit ------------------------------------------------------------------------------------------------------

    def create(self, new: NewRun, key: str | None = None, body: Json | None = None, limit: int = 0) -> tuple[Run, bool]:
        """(the run, whether it was made now). With an idempotency key the same body gives the same run.

        Args:
            key: of this user's; None: every call makes a run.
            body: what was asked for, to compare with what came with the key before.
            limit: of the user's runs that have not ended; 0: none.

        Raises:
            Conflict: the key came with another body; another run that has not ended writes the same folder; too many
                runs.
        """
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        now = time.time()
        with self.database.writing() as connection:
            if key is not None and (found := _known(connection, new.user, key, digest)):
                return found, False
            _check_quota(connection, new.user, limit)
            run_id = f"run-{uuid.uuid4().hex[:12]}"
            values = asdict(new) | {
                "id": run_id, "name": new.name or f"{new.kind} {run_id[4:10]}", "state": "validating",
                "desired": "running", "reason": "", "attempt": 0, "fruitless": 0, "not_before": 0.0, "created": now,
                "updated": now, "progress": {},
            }  # fmt: skip
            try:
                connection.execute(insert(runs).values(values))
            except IntegrityError:
                raise Conflict(f"another run that has not ended writes {new.out}; wait, or set another out") from None
            if key is not None:
                record = {"user": new.user, "key": key, "body": digest, "run": run_id, "created": now}
                connection.execute(insert(idempotency).values(record))
            _event(connection, run_id, "submitted", "validating", {"user": new.user, "kind": new.kind})
            return self._get(connection, run_id), True

    # -- read --------------------------------------------------------------------------------------------------------

    def get(self, run_id: str) -> Run:
        """NotFound where there is none."""
        with self.database.reading() as connection:
            return self._get(connection, run_id)

    def _get(self, connection: Connection, run_id: str) -> Run:
        return as_run(self._row(connection, run_id))

    def _row(self, connection: Connection, run_id: str) -> RowMapping:
        row = connection.execute(select(runs).where(runs.c.id == run_id)).mappings().first()
        if row is None:
            raise NotFound(f"there is no run {run_id}")
        return row

    def runs(self, after: str | None = None, limit: int = 50, wanted: Wanted = ALL) -> list[Run]:
        """Those that come after the run `after`; NotFound where there is none."""
        with self.database.reading() as connection:
            last = None if after is None else self._row(connection, after)
            return [as_run(row) for row in connection.execute(wanted.page(limit, last)).mappings()]

    def count(self, wanted: Wanted = ALL) -> int:
        """How many runs `runs` gives, on all pages."""
        with self.database.reading() as connection:
            return connection.execute(wanted.count()).scalar() or 0

    def counts(self) -> dict[str, int]:
        """State -> number of runs; states without a run are left out."""
        with self.database.reading() as connection:
            rows = connection.execute(select(runs.c.state, func.count()).group_by(runs.c.state))
            return {str(row[0]): int(row[1]) for row in rows}

    def attempts(self, run_id: str) -> list[Attempt]:
        """Of one run, the first first."""
        query = select(attempts).where(attempts.c.run == run_id).order_by(attempts.c.number)
        with self.database.reading() as connection:
            return [Attempt(**cast(Json, dict(row))) for row in connection.execute(query).mappings()]

    def used(self, run_ids: Sequence[str]) -> dict[str, tuple[float, float | None]]:
        """Run -> (seconds that its attempts took, since when one is at work, or None); of runs that were started."""
        with self.database.reading() as connection:
            return {str(run): (float(took or 0.0), since) for run, took, since in connection.execute(used(run_ids))}

    def events(self, after: int = 0, run_id: str | None = None, limit: int = 500) -> list[Event]:
        """Those after an id, the oldest first."""
        query = select(events).where(events.c.id > after).order_by(events.c.id).limit(limit)
        if run_id is not None:
            query = query.where(events.c.run == run_id)
        with self.database.reading() as connection:
            return [Event(**cast(Json, dict(row))) for row in connection.execute(query).mappings()]

    def last_event(self) -> int:
        """The newest id; 0 before the first."""
        with self.database.reading() as connection:
            return connection.execute(select(func.max(events.c.id))).scalar() or 0

    # -- change ------------------------------------------------------------------------------------------------------

    def move(self, run: Run, to: State, event: str, data: Json | None = None, **values: object) -> bool:
        """Compare and swap: the state of a run, where it and the wish are still what `run` says.

        Args:
            event, data: what is written beside it.
            values: other columns of the run.

        Returns:
            Whether it was so, and is changed.
        """
        with self.database.writing() as connection:
            return swap(connection, run, to, event, data, **values)

    def wish(self, run_id: str, desired: Desired, user: str = "") -> Run:
        """What people ask: cancel, pause, resume. A run that does not run changes at once, another one when its
        processes have ended. The same wish again changes nothing.

        Raises:
            NotFound, Conflict: no such run; a run that has ended, or that cannot be paused while it runs.
        """
        with self.database.writing() as connection:
            run = self._get(connection, run_id)
            to = _answer(run, desired)
            if to is None and (run.is_over or run.desired == desired):
                return run
            event = {"running": "resume", "paused": "pause", "cancelled": "cancel"}[desired]
            now = time.time()
            ended = {"ended": now} if to == "cancelled" else {}
            swap(connection, run, to or run.state, event, {"user": user}, desired=desired, **ended)
            return self._get(connection, run_id)

    def retry(self, run_id: str, user: str = "") -> Run:
        """Another attempt of a run that failed or was cancelled, on from its newest checkpoint.

        Raises:
            NotFound, Conflict: no such run; one that has not ended, or well; its folder is another run's now.
        """
        with self.database.writing() as connection:
            run = self._get(connection, run_id)
            if "queued" not in NEXT[run.state] or not run.is_over:
                raise Conflict(f"{run_id} is {run.state}; only a run that failed or was cancelled is tried again")
            fresh = {"fruitless": 0, "not_before": 0.0, "failure": None, "reason": "", "ended": None}
            try:
                swap(connection, run, "queued", "retry", {"user": user}, desired="running", **fresh)
            except IntegrityError:
                raise Conflict(f"another run that has not ended writes {run.out}; wait for its end") from None
            return self._get(connection, run_id)

    def progress(self, run_id: str, values: Json) -> None:
        """Replace what is known of how far a run is; no event."""
        with self.database.writing() as connection:
            connection.execute(update(runs).where(runs.c.id == run_id).values(progress=values, updated=time.time()))

    def note(self, run_id: str, event: str, data: Json) -> None:
        """An event that changes no state."""
        with self.database.writing() as connection:
            _event(connection, run_id, event, None, data)

    def record(self, user: str, action: str, run: str | None = None, key: str | None = None, **data: object) -> None:
        """A line of the audit: who asked for what."""
        with self.database.writing() as connection:
            values = {"time": time.time(), "user": user, "key": key, "action": action, "run": run, "data": data}
            connection.execute(insert(audit).values(values))

    # -- events that a training run writes into its folder ---------------------------------------------------------

    def offset(self, run_id: str, file: str) -> int:
        """How many bytes of the file were taken over."""
        query = select(read_events.c.offset).where(read_events.c.run == run_id, read_events.c.file == file)
        with self.database.reading() as connection:
            return connection.execute(query).scalar() or 0

    def take_over(self, run_id: str, file: str, old: int, new: int, lines: Iterable[Json]) -> bool:
        """Store the events between two offsets of a file; False where another scheduler was faster."""
        with self.database.writing() as connection:
            place = (read_events.c.run == run_id, read_events.c.file == file)
            known = connection.execute(select(read_events.c.offset).where(*place)).scalar()
            if (known or 0) != old:
                return False
            if known is None:
                connection.execute(insert(read_events).values(run=run_id, file=file, offset=new))
            else:
                connection.execute(update(read_events).where(*place).values(offset=new))
            for line in lines:
                data = {key: value for key, value in line.items() if key not in ("event", "time")}
                _event(connection, run_id, str(line["event"])[:40], None, data, float(line["time"]))
            return True

    def forget_old_keys(self) -> None:
        """Idempotency keys are kept for a week."""
        with self.database.writing() as connection:
            connection.execute(delete(idempotency).where(idempotency.c.created < time.time() - KEEP_IDEMPOTENCY_S))


def swap(connection: Connection, run: Run, to: State, event: str, data: Json | None = None, **values: object) -> bool:
    """See `Store.move`; inside of a transaction."""
    assert to == run.state or to in NEXT[run.state], f"{run.state} -> {to}"
    changed = connection.execute(
        update(runs)
        .where(runs.c.id == run.id, runs.c.state == run.state, runs.c.desired == run.desired)
        .where(runs.c.attempt == run.attempt)
        .values({"state": to, "updated": time.time()} | values)
    )
    if changed.rowcount != 1:
        return False
    _event(connection, run.id, event, to, data or {})
    return True


def _answer(run: Run, desired: Desired) -> State | None:
    """The state that a wish makes of a run at once; None: it stays."""
    if run.is_over:
        if desired == "cancelled":  # whatever came first stands
            return None
        raise Conflict(f"{run.id} is {run.state}; it can be tried again or forked, but not paused or resumed")
    if desired == "cancelled":
        return None if run.state == "cancelling" else "cancelling" if run.state in ACTIVE else "cancelled"
    if run.desired == "cancelled":
        raise Conflict(f"{run.id} is being cancelled")
    if desired == "paused":
        if run.state in ("paused", "pausing"):
            return None
        if run.state in ACTIVE:
            if run.kind != "train":
                raise Conflict(f"a {run.kind} job keeps nothing of what it has done; it can be cancelled, not paused")
            return "pausing"
        return "paused"
    return "queued" if run.state == "paused" else None


def _known(connection: Connection, user: str, key: str, digest: str) -> Run | None:
    query = select(idempotency).where(idempotency.c.user == user, idempotency.c.key == key)
    row = connection.execute(query).mappings().first()
    if row is None:
        return None
    if row["body"] != digest:
        raise Conflict(f"the idempotency key {key!r} came with another body before; take a new key")
    return as_run(connection.execute(select(runs).where(runs.c.id == row["run"])).mappings().one())


def _check_quota(connection: Connection, user: str, limit: int) -> None:
    if limit:
        query = select(func.count()).where(runs.c.user == user, runs.c.state.not_in(TERMINAL))
        if (connection.execute(query).scalar() or 0) >= limit:
            raise Quota(f"{user} has {limit} runs that have not ended, as many as one user may have")


class Quota(UserError):
    """A user has as much as one user may have."""


def _event(
    connection: Connection, run: str, event: str, state: str | None, data: Json, when: float | None = None
) -> None:
    values = {"run": run, "time": when or time.time(), "event": event, "state": state, "data": data}
    connection.execute(insert(events).values(values))
