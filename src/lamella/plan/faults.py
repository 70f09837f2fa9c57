"""How often a run of many GPUs is interrupted, and what part of the time it trains: saving, lost steps, restarts.

The rate of faults is that of Llama 3's pretraining: 419 unexpected interruptions in 54 days on 16,384 H100s (The Llama
3 Herd of Models, arXiv 2407.21783, table 5). Saving every sqrt(2 d M) seconds costs least, for saves of d seconds and M
seconds between faults (Young, CACM 1974).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lamella.plan.layout import Layout
from lamella.plan.memory import Memory

FAULTS_PER_GPU_HOUR = 419 / (54 * 24 * 16384)
RESTART_S = 600.0
"""From a fault to the first step of the next attempt, but for reading the checkpoint: finding out, queueing, starting,
compiling. A guess."""
STORAGE_RATE = 10e9
"""Bytes a second that all ranks together write to a shared file system. A guess: --storage-gb-per-second says yours."""
STAGING_RATE = 20e9
"""Bytes a second from a GPU to main memory, over PCI Express 4 x16."""


@dataclass(frozen=True)
class Faults:
    """What saving and faults take of a run's time."""

    write_s: float
    """A checkpoint is written for so long."""
    blocked_s: float
    """Of these the ranks wait."""
    hours_between: float
    effective: float
    """The share of the time in which steps are made that last."""
    best_save_every_steps: int
    """Saving this often costs least."""
    best_effective: float
    storage_bytes_per_s: float

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return dict(vars(self))


def faults(layout: Layout, step_s: float, storage_rate: float = STORAGE_RATE) -> Faults:
    """The faults of a run whose steps take `step_s`."""
    memory = Memory(layout)
    write_s = memory.checkpoint_bytes() / storage_rate
    staged = sum(memory.state.values()) / STAGING_RATE
    blocked_s = min(write_s, staged) if layout.recipe.checkpoint_async else write_s
    between_s = 3600 / (FAULTS_PER_GPU_HOUR * layout.num_ranks)

    def effective(every: int) -> float:
        interval = every * step_s
        lost = (RESTART_S + write_s + (interval + blocked_s) / 2) / between_s  # it is read as fast as it is written
        return max(0.0, interval / (interval + blocked_s) - lost)

    shortest = max(blocked_s, write_s)  # the next save waits for the one before
    best = max(1, math.ceil(shortest / step_s), round(math.sqrt(2 * blocked_s * between_s) / step_s))
    every = layout.recipe.save_every_steps
    return Faults(write_s, blocked_s, between_s / 3600, effective(every), best, effective(best), storage_rate)
