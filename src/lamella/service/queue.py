"""Which run is next: by priority, then whose user has least, then the oldest; never more than the machine has.

Imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, Select, func, insert, select, update

from lamella.jsons import Json
from lamella.service.schema import attempts, hosts, runs
from lamella.service.states import ACTIVE, TERMINAL
from lamella.service.store import Attempt, Run, Store, as_run, swap


@dataclass(frozen=True)
class Capacity:
    """What this machine has for runs."""

    gpus: int
    cores: int


@dataclass
class Free:
    """What is left, and how much each user has."""

    gpus: set[int]
    cores: int
    used: dict[str, int]


def claim(store: Store, host: str, capacity: Capacity, executor: str = "local") -> tuple[Run, Attempt] | None:
    """Take the next run of the queue that fits, as a new attempt in the state `starting`; None where there is none.

    Several schedulers may ask at once: each run is taken by one of them.
    """
    with store.database.writing() as connection:
        free = _free(connection, host, capacity, executor)
        for run in _candidates(connection, executor, free.used):
            if run.gpus > len(free.gpus) or run.cores > free.cores:
                return None  # whoever is next waits; what is smaller does not overtake it for ever
            devices = sorted(free.gpus)[: run.gpus]
            now = time.time()
            values: Json = {
                "run": run.id, "number": run.attempt + 1, "host": host, "handle": {}, "devices": devices,
                "started": now, "reason": "", "saves": run.progress.get("saves", 0),
            }  # fmt: skip
            number = connection.execute(insert(attempts).values(values).returning(attempts.c.id)).scalar_one()
            swap(
                connection, run, "starting", "start", {"attempt": run.attempt + 1, "host": host, "devices": devices},
                attempt=run.attempt + 1, started=run.started or now,
            )  # fmt: skip
            taken = connection.execute(select(runs).where(runs.c.id == run.id)).mappings().one()
            more: Json = {"ended": None, "code": None, "failure": None, "signalled": None}
            return as_run(taken), Attempt(id=number, **values, **more)
    return None


def active(store: Store, host: str) -> list[tuple[Run, Attempt]]:
    """The runs that may have processes, of which this host's scheduler looks after the attempt."""
    joined = runs.join(attempts, (attempts.c.run == runs.c.id) & (attempts.c.number == runs.c.attempt))
    query = select(attempts.c.id).select_from(joined).where(runs.c.state.in_(ACTIVE), attempts.c.host == host)
    return _with_runs(store, query.order_by(runs.c.seq))


def _with_runs(store: Store, query: Select[tuple[int]]) -> list[tuple[Run, Attempt]]:
    """The attempts whose numbers the query finds, each with its run."""
    with store.database.reading() as connection:
        pairs = []
        for number in connection.execute(query).scalars():
            row = connection.execute(select(attempts).where(attempts.c.id == number)).mappings().one()
            run = connection.execute(select(runs).where(runs.c.id == row["run"])).mappings().one()
            pairs.append((as_run(run), Attempt(**dict(row))))
    return pairs


def at_work(store: Store, host: str) -> None:
    """Note that the scheduler of a host is at work now."""
    with store.database.writing() as connection:
        if not connection.execute(update(hosts).where(hosts.c.host == host).values(looked=time.time())).rowcount:
            connection.execute(insert(hosts).values(host=host, looked=time.time()))


def of_silent_hosts(store: Store, host: str, silent_s: float) -> list[tuple[Run, Attempt]]:
    """The runs that may have processes, whose attempt another host's scheduler looks after that has been silent for so
    long, or that was never heard of and began so long ago. The clocks of hosts must agree better than that."""
    now = time.time()
    joined = runs.join(attempts, (attempts.c.run == runs.c.id) & (attempts.c.number == runs.c.attempt))
    joined = joined.outerjoin(hosts, hosts.c.host == attempts.c.host)
    query = select(attempts.c.id).select_from(joined).where(runs.c.state.in_(ACTIVE), attempts.c.host != host)
    return _with_runs(store, query.where(func.coalesce(hosts.c.looked, attempts.c.started) < now - silent_s))


def adopt(store: Store, attempt: Attempt, host: str) -> bool:
    """Let this host's scheduler look after an attempt, unless another one was faster."""
    with store.database.writing() as connection:
        mine = update(attempts).where(attempts.c.id == attempt.id, attempts.c.host == attempt.host)
        return bool(connection.execute(mine.values(host=host)).rowcount)


def left_over(store: Store, host: str) -> list[tuple[Run, Attempt]]:
    """Attempts of this host that nobody has ended, of runs that others have ended or started again meanwhile."""
    joined = runs.join(attempts, attempts.c.run == runs.c.id)
    query = select(attempts.c.id).select_from(joined).where(attempts.c.host == host, attempts.c.ended.is_(None))
    return _with_runs(store, query.where(runs.c.state.in_(TERMINAL) | (attempts.c.number < runs.c.attempt)))


def in_state(store: Store, state: str, limit: int = 500) -> list[Run]:
    """The oldest runs of a state."""
    with store.database.reading() as connection:
        query = select(runs).where(runs.c.state == state).order_by(runs.c.seq).limit(limit)
        return [as_run(row) for row in connection.execute(query).mappings()]


def awaited(store: Store) -> set[str]:
    """The executors for which runs wait in the queue."""
    with store.database.reading() as connection:
        query = select(runs.c.executor).where(runs.c.state == "queued", runs.c.not_before <= time.time()).distinct()
        return {row[0] for row in connection.execute(query)}


def change_attempt(store: Store, attempt: Attempt, **values: object) -> None:
    """Columns of an attempt."""
    with store.database.writing() as connection:
        connection.execute(update(attempts).where(attempts.c.id == attempt.id).values(values))


def _free(connection: Connection, host: str, capacity: Capacity, executor: str) -> Free:
    gpus, cores, used = set(range(capacity.gpus)), capacity.cores, dict[str, int]()
    joined = runs.join(attempts, (attempts.c.run == runs.c.id) & (attempts.c.number == runs.c.attempt))
    query = select(runs.c.user, runs.c.gpus, runs.c.cores, attempts.c.devices).select_from(joined)
    query = query.where(runs.c.state.in_(ACTIVE), runs.c.executor == executor, attempts.c.host == host)
    for user, num_gpus, num_cores, devices in connection.execute(query):
        used[user] = used.get(user, 0) + max(num_gpus, num_cores, 1)
        gpus -= set(devices)
        cores -= num_cores
    return Free(gpus, cores, used)


def _candidates(connection: Connection, executor: str, used: dict[str, int]) -> Iterator[Run]:
    """The oldest run of each user and priority, the best first."""
    waiting = (runs.c.state == "queued", runs.c.executor == executor, runs.c.not_before <= time.time())
    oldest = select(runs.c.user, runs.c.priority, func.min(runs.c.seq)).where(*waiting)
    found = connection.execute(oldest.group_by(runs.c.user, runs.c.priority)).all()
    for _, _, seq in sorted(found, key=lambda row: (-row[1], used.get(row[0], 0), row[2])):
        yield as_run(connection.execute(select(runs).where(runs.c.seq == seq)).mappings().one())
