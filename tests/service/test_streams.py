"""Streams of events and logs: they go on after the last id, and whoever does not read holds nothing."""

from __future__ import annotations

import asyncio
import json

import pytest
from sqlalchemy import insert
from starlette.testclient import TestClient

from lamella.service import streams
from lamella.service.context import Service
from lamella.service.schema import events
from lamella.service.store import Store
from lamella.service.streams import Hub
from support.service import evaluation, new_run, problem

pytestmark = pytest.mark.faults


def listen(store: Store, after: int, count: int, run: str | None = None) -> list[int]:
    """The ids of the next events of a stream."""

    async def collect() -> list[int]:
        hub = Hub(store)
        await hub.start()
        reading = asyncio.create_task(hub.run())
        found: list[int] = []
        stream = hub.stream(after, run)
        async for event in stream:
            found.append(int(event.id))
            if len(found) == count:
                break
        await stream.aclose()
        assert hub.listeners == 0
        reading.cancel()
        return found

    return asyncio.run(asyncio.wait_for(collect(), 20))


def test_a_stream_goes_on_after_the_last_id(service: Service) -> None:
    """Case 28: whatever was read before, nothing is missed and nothing comes twice."""
    store = service.store
    run, other = store.create(new_run())[0], store.create(new_run())[0]
    for i in range(20):
        store.note((run, other)[i % 2].id, "note", {"i": i})
    ids = [e.id for e in store.events()]
    for cut in (0, 1, 7, 20):
        assert listen(store, ids[cut], len(ids) - cut - 1) == ids[cut + 1 :]
    own = [e.id for e in store.events(run_id=run.id)]
    assert listen(store, own[3], len(own) - 4, run.id) == own[4:]


@pytest.mark.slow
def test_a_listener_that_does_not_read_holds_nothing(service: Service) -> None:
    """Case 28: 3,000 events later it reads all of them from the store, and the hub keeps its bound."""
    store = service.store
    run = store.create(new_run())[0]

    async def scenario() -> None:
        hub = Hub(store)
        await hub.start()
        slow = hub.stream(0, None)
        first = await anext(slow)
        with store.database.writing() as connection:
            rows = [{"run": run.id, "time": 0.0, "event": "note", "state": None, "data": {}} for _ in range(6000)]
            connection.execute(insert(events), rows)
        reading = asyncio.create_task(hub.run())
        while hub.last < store.last_event():
            await asyncio.sleep(0.05)
        assert len(hub._events) <= 2 * streams.KEEP + 500
        seen = [int(first.id)]
        async for event in slow:
            seen.append(int(event.id))
            if seen[-1] == store.last_event():
                break
        assert seen == list(range(1, store.last_event() + 1))
        reading.cancel()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_logs_are_read_from_any_place(service: Service, client: TestClient) -> None:
    run = client.post("/v1/jobs", json=evaluation()).json()["id"]
    log = service.place.log(run)
    log.parent.mkdir(parents=True)
    log.write_text("äöü\n" * 100)
    read, offset = "", 0
    while True:
        part = client.get(f"/v1/jobs/{run}/logs", params={"offset": offset, "limit": 33}).json()
        if part["offset"] == offset:
            break
        read, offset = read + part["text"], part["offset"]
    assert read == "äöü\n" * 100
    assert "no log" in problem(client.get(f"/v1/jobs/{run}/logs", params={"source": "../../etc/passwd"}), 404)
    client.post(f"/v1/jobs/{run}/cancel")
    streamed = client.get(f"/v1/jobs/{run}/logs/stream", headers={"Last-Event-ID": str(7 * 50)}).text
    data = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    assert "".join(d.get("text", "") for d in data) == "äöü\n" * 50
    assert "event: end" in streamed
