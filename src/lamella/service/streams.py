"""Streams of events and logs: each client has its place and nothing else, so that a slow or dead one costs nothing.

One task reads new events from the store; all clients read them from one bounded list, and from the store what is older.
Imports no torch.
"""

from __future__ import annotations

import asyncio
import json
import logging
from bisect import bisect_right
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path

from sse_starlette import EventSourceResponse, ServerSentEvent

from lamella.jsons import Json
from lamella.service.database import Unavailable
from lamella.service.store import Event, Store

log = logging.getLogger("lamella.service")
KEEP = 2_000
POLL_S, RETRY_S = 0.3, 2.0
READ, BATCH = 500, 200
PING_S, SEND_TIMEOUT_S = 15, 30
CHUNK_BYTES = 65_536


class Hub:
    """The newest events, for all who listen."""

    def __init__(self, store: Store):
        self.store = store
        self.listeners = 0
        self._events: list[Event] = []
        self._ids: list[int] = []
        self._floor = 0
        """All events after this id are in the list."""
        self._news = asyncio.Event()
        self._closed = False

    async def start(self) -> None:
        """Begin at the newest event."""
        self._floor = await asyncio.to_thread(self.store.last_event)

    async def run(self) -> None:
        """Read what is new, until cancelled."""
        while True:
            try:
                new = await asyncio.to_thread(self.store.events, self.last, None, READ)
            except Unavailable as error:
                log.warning("%s", error)
                new = []
                await asyncio.sleep(RETRY_S)
            if new:
                self._add(new)
            if len(new) < READ:
                await asyncio.sleep(POLL_S)

    def close(self) -> None:
        """Streams end when they have told all that there is."""
        self._closed = True
        self._news.set()

    @property
    def last(self) -> int:
        """The id of the newest event."""
        return self._ids[-1] if self._ids else self._floor

    def _add(self, new: list[Event]) -> None:
        self._events += new
        self._ids += [event.id for event in new]
        if len(self._ids) > 2 * KEEP:
            self._floor = self._ids[-KEEP - 1]
            del self._events[:-KEEP], self._ids[:-KEEP]
        self._news.set()
        self._news = asyncio.Event()

    async def after(self, last: int, run_id: str | None) -> tuple[list[Event], int]:
        """(events after an id, the id up to which they are all)."""
        if last < self._floor:
            found = await asyncio.to_thread(self.store.events, last, run_id, BATCH)
            return found, found[-1].id if found else self._floor
        start = bisect_right(self._ids, last)
        part = self._events[start : start + BATCH]
        return [e for e in part if run_id in (None, e.run)], part[-1].id if part else last

    async def stream(self, last: int, run_id: str | None) -> AsyncIterator[ServerSentEvent]:
        """All events after an id, as they come."""
        self.listeners += 1
        try:
            while True:
                news = self._news
                found, upto = await self.after(last, run_id)
                for event in found:
                    yield ServerSentEvent(json.dumps(asdict(event)), event=event.event, id=str(event.id))
                if upto == last:
                    if self._closed:
                        return
                    await news.wait()
                last = upto
        finally:
            self.listeners -= 1


def respond(stream: AsyncIterator[ServerSentEvent]) -> EventSourceResponse:
    """An answer that pings, notices who is gone, and waits only so long for who does not read."""
    return EventSourceResponse(stream, ping=PING_S, send_timeout=SEND_TIMEOUT_S)


def read_log(file: Path, offset: int, limit: int = CHUNK_BYTES) -> tuple[str, int]:
    """(text from an offset on, the offset after it); a character that is not whole yet is left for the next time."""
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            raw = stream.read(limit)
    except OSError:
        return "", offset
    for cut in range(min(4, len(raw))):
        try:
            text = raw[: len(raw) - cut].decode()
        except UnicodeDecodeError:
            continue
        return text, offset + len(raw) - cut
    return raw.decode(errors="replace"), offset + len(raw)


async def follow(file: Path, offset: int, store: Store, run_id: str) -> AsyncIterator[ServerSentEvent]:
    """What is written to a log, until the run has ended and all is read; ids are offsets."""
    while True:
        over = await asyncio.to_thread(lambda: store.get(run_id).is_over)  # before reading: nothing comes after it
        while True:
            text, after = await asyncio.to_thread(read_log, file, offset)
            if after == offset:
                break
            offset = after
            yield ServerSentEvent(json.dumps({"text": text, "offset": offset}), event="log", id=str(offset))
        if over:
            yield ServerSentEvent(json.dumps({"offset": offset}), event="end", id=str(offset))
            return
        await asyncio.sleep(POLL_S)


def finite(line: str | bytes) -> Json | None:
    """A JSON object in which what is no number (NaN, Infinity) is null; None where the line is none."""
    try:
        values = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
