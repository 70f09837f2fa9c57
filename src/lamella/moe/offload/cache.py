"""One cache for the experts of all layers: which are in memory, which are on their way, and which must go.

An expert's worth is how often it was asked for, each time half as much after HALF_LIFE tokens (frequency and recency
in one number, LRFU: Lee et al., IEEE Trans. Computers 50(12), 2001). The worth of all shrinks alike, so its logarithm
is kept as log2(worth) + now / HALF_LIFE, which only changes when the expert is asked for.

Only the thread that computes decides what is where; reader threads fill slots and say when they are done.
"""

from __future__ import annotations

import heapq
import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lamella.errors import UserError
from lamella.moe.offload.readers import Readers
from lamella.moe.offload.slots import Home, Key, Slot

HALF_LIFE = 64.0
"""Tokens."""
READERS = 4
"""Threads: a disk reads several ranges at a time faster than one."""
GUESS_MARGIN = 4.0
"""In log2: a guess may take the place of what is worth at most 16 times as much, since it is needed at once."""


@dataclass
class CacheCounts:
    """What the cache has done since the counts began."""

    hits: int = 0
    """Asked for and in memory, or on the way since it was guessed."""
    misses: int = 0
    guessed: int = 0
    """Read ahead."""
    guessed_right: int = 0
    """Of these, asked for while they were there."""
    bytes_read: int = 0
    stall_s: float = 0.0
    """The computation waited this long for experts."""
    tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of experts that did not have to be asked of their home when they were needed."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def bytes_per_token(self) -> float:
        """Read from the experts' home, guesses included."""
        return self.bytes_read / max(self.tokens, 1)


class ExpertCache:
    """At most `num_slots` experts in memory."""

    def __init__(self, home: Home, num_slots: int, num_readers: int = READERS):
        self.home, self.num_slots = home, num_slots
        self.counts = CacheCounts()
        self.now = 0.0
        """Tokens so far."""
        self._slots: dict[Key, Slot] = {}
        self._free = [home.new_slot() for _ in range(num_slots)]
        self._worth: dict[Key, float] = {}
        self._heap: list[tuple[float, Key]] = []
        self._guessed: dict[int, list[Slot]] = {}
        """Of a layer that has not been computed since, what was read ahead."""
        self._readers = Readers(home, num_readers)
        weakref.finalize(self, self._readers.close)

    def told(self) -> str:
        """What it has done, in a line."""
        counts, size = self.counts, self.home.slot_bytes
        return (
            f"experts: {self.num_slots} in {self.num_slots * size / 2**20:,.1f} MiB; {counts.hit_rate:.0%} were there, "
            f"{counts.bytes_per_token / 2**20:,.1f} MiB read and {1000 * counts.stall_s / max(counts.tokens, 1):.1f} "
            f"ms waited a token; {counts.guessed_right} of {counts.guessed} read ahead were needed"
        )

    def ask(self, layer: int, experts: Sequence[int]) -> list[Slot]:
        """A slot for each expert, held until `release`; those that were not here are on their way.

        At most `num_slots` can be held at a time.
        """
        here = [self._slots.get((layer, e)) for e in experts]
        for slot in here:
            if slot is not None:
                slot.pins += 1  # before others look for what can go
        slots = []
        for e, slot in zip(experts, here, strict=True):
            key = (layer, e)
            if slot is None:
                self.counts.misses += 1
                slot = self._bring(key, is_guess=False)
                assert slot is not None
                slot.pins += 1
            else:
                self.counts.hits += 1
                self.counts.guessed_right += slot.is_guess
                slot.is_guess = False
                self._readers.hurry(slot)
            self._value(key)
            slots.append(slot)
        for slot in self._guessed.pop(layer, ()):  # wrong ones can go from now on
            slot.is_guess = False
        return slots

    def guess(self, layer: int, experts: Sequence[int]) -> None:
        """These will be asked for next: read those that are not here, where something less worth can go."""
        for e in experts:
            if (layer, e) not in self._slots and (slot := self._bring((layer, e), is_guess=True)):
                self._guessed.setdefault(layer, []).append(slot)
                self.counts.guessed += 1

    def wait(self, slot: Slot) -> None:
        """Until the slot's expert is there.

        Raises:
            UserError: it could not be read.
        """
        if not slot.ready.is_set():
            began = time.perf_counter()
            slot.ready.wait()
            self.counts.stall_s += time.perf_counter() - began
        if slot.error is not None:
            raise UserError(f"an expert cannot be read: {slot.error}") from slot.error

    def release(self, slots: Sequence[Slot]) -> None:
        """The computation no longer needs these where they are."""
        for slot in slots:
            slot.pins -= 1
            if slot.gate_up.is_cuda:
                slot.last_use = torch.cuda.Event()
                slot.last_use.record()

    def holds(self, layer: int, expert: int) -> bool:
        """Whether the expert is here, or on its way."""
        return (layer, expert) in self._slots

    def _value(self, key: Key) -> None:
        """The expert was asked for now."""
        at = self.now / HALF_LIFE
        before = self._worth.get(key)
        worth = at if before is None else at + math.log2(1 + 2 ** max(before - at, -60.0))
        self._worth[key] = worth

    def _bring(self, key: Key, is_guess: bool) -> Slot | None:
        """A slot that an expert is being read into; None for a guess that nothing should go for."""
        slot = self._free.pop() if self._free else self._evicted(key if is_guess else None)
        if slot is None:
            return None
        slot.key, slot.is_guess, slot.error = key, is_guess, None
        slot.ready.clear()
        self._slots[key] = slot
        heapq.heappush(self._heap, (self._worth.get(key, -1.0), key))
        self.counts.bytes_read += self.home.expert_bytes(key)
        self._readers.fill(slot, urgent=not is_guess)
        return slot

    def _evicted(self, guess: Key | None) -> Slot | None:
        """The slot of the least worth that can go now. A guess does not take what is worth more than itself."""
        passed: list[tuple[float, Key]] = []
        found: Slot | None = None
        while self._heap:
            worth, key = heapq.heappop(self._heap)
            slot = self._slots.get(key)
            if slot is None:
                continue
            if (known := self._worth.get(key, -1.0)) > worth:
                heapq.heappush(self._heap, (known, key))
                continue
            if slot.pins or slot.is_guess or not slot.ready.is_set():
                passed.append((worth, key))
                continue
            if guess is not None and worth > self._worth.get(guess, -1.0) + GUESS_MARGIN:
                passed.append((worth, key))
            else:
                found = slot
            break
        for entry in passed:
            heapq.heappush(self._heap, entry)
        if found is None and guess is None:
            found = self._forced()
        if found is not None and found.key is not None:
            del self._slots[found.key]
        return found

    def _forced(self) -> Slot:
        """All others are held: a guess goes, when its reading has ended."""
        slot = next(slot for slot in self._slots.values() if not slot.pins)
        self._readers.hurry(slot)
        self.wait(slot)
        return slot
