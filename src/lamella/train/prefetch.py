"""What the next steps need, made by a thread while this step is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
CLOSE_S = 60.0
"""A thread that other ranks keep waiting for longer than this is left to the end of the process."""


class _Failed(NamedTuple):
    error: BaseException


class Prefetch(Generic[T]):
    """The items of an iterator, made ahead by a thread.

    The thread makes `depth` items more than were taken and, at the end, one more; it never stops on the way to them.
    So threads of several ranks that meet in making each item do so equally often.
    """

    def __init__(self, items: Iterator[T], depth: int):
        self.items, self.closing = items, threading.Event()
        self.queue: queue.Queue[T | _Failed | None] = queue.Queue(depth)
        self.thread = threading.Thread(target=self._make, name="prefetch", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """The next item; whatever making it raised is raised here."""
        item = self.queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, _Failed):
            raise item.error
        return item

    def close(self) -> None:
        """End the thread when it has made what it makes ahead."""
        self.closing.set()
        self.thread.join(CLOSE_S)

    def _make(self) -> None:
        try:
            for item in self.items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(_Failed(error))

    def _put(self, item: T | _Failed | None) -> bool:
        """Whether the item was put, and not left because the queue is full and nobody takes any more."""
        while True:
            try:
                self.queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                if self.closing.is_set():
                    return False
