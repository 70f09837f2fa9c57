"""Threads that fill slots: what is waited for first, what was guessed after it."""

from __future__ import annotations

import threading
from collections import deque

from lamella.moe.offload.slots import Home, Slot


class Readers:
    """They know nothing of the cache, so that it can be let go while they wait."""

    def __init__(self, home: Home, num_threads: int):
        self.home = home
        self._urgent: deque[Slot] = deque()
        self._guesses: deque[Slot] = deque()
        self._work = threading.Condition()
        self._is_open = True
        for _ in range(num_threads):
            threading.Thread(target=self._run, daemon=True, name="expert reader").start()

    def fill(self, slot: Slot, urgent: bool) -> None:
        """Bring the expert that the slot's key names; the slot says when it is there."""
        with self._work:
            (self._urgent if urgent else self._guesses).append(slot)
            self._work.notify()

    def hurry(self, slot: Slot) -> None:
        """What was guessed is needed: it goes before other guesses."""
        if slot.ready.is_set():
            return
        with self._work:
            if slot in self._guesses:
                self._guesses.remove(slot)
                self._urgent.append(slot)

    def close(self) -> None:
        """Let the threads end."""
        with self._work:
            self._is_open = False
            self._work.notify_all()

    def _run(self) -> None:
        while (slot := self._next()) is not None:
            try:
                assert slot.key is not None
                self.home.fill(slot, slot.key)
            except Exception as error:  # told by the thread that waits for the slot
                slot.error = error
            slot.ready.set()
            del slot

    def _next(self) -> Slot | None:
        with self._work:
            while self._is_open and not self._urgent and not self._guesses:
                self._work.wait()
            return (self._urgent or self._guesses).popleft() if self._is_open else None
