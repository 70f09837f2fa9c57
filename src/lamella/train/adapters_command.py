"""`lamella adapters learn` and `route` for people: a line of progress."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lamella.display import TrainingProgress
from lamella.evaluate.checkpoints import parse_device


@contextmanager
def progress(steps: int, device: str) -> Iterator[tuple[Callable[[int, float], None], str]]:
    """(what to tell each step and its loss, the device); UserError for a device that is not there."""
    display = TrainingProgress(sys.stderr, 0, steps)
    try:
        yield lambda step, loss: display.show({"step": step, "loss": loss, "heldout_loss": None}), parse_device(device)
    finally:
        display.close()
