"""What a run may be, what may follow, and what people may wish. Imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

State = Literal[
    "validating", "queued", "starting", "running", "pausing", "paused", "preempted", "cancelling", "lost",
    "succeeded", "failed", "cancelled",
]  # fmt: skip
Desired = Literal["running", "paused", "cancelled"]
"""What is wished of a run; what it is, is its state."""
STATES: tuple[State, ...] = get_args(State)
TERMINAL: frozenset[State] = frozenset({"succeeded", "failed", "cancelled"})
ACTIVE: frozenset[State] = frozenset({"starting", "running", "pausing", "cancelling", "lost"})
"""An attempt may be running somewhere, and holds its share of the machine."""
WAITING: frozenset[State] = frozenset({"validating", "queued", "paused", "preempted"})
"""Nothing runs."""

NEXT: dict[State, frozenset[State]] = {
    "validating": frozenset({"queued", "failed", "cancelled", "paused"}),
    "queued": frozenset({"starting", "paused", "cancelled", "failed"}),
    "starting": frozenset(
        {"running", "queued", "preempted", "pausing", "paused", "cancelling", "lost", "succeeded", "failed"}
    ),
    "running": frozenset({"queued", "preempted", "pausing", "cancelling", "lost", "succeeded", "failed"}),
    "pausing": frozenset({"paused", "queued", "preempted", "cancelling", "lost", "succeeded", "failed"}),
    "paused": frozenset({"queued", "cancelled"}),
    "preempted": frozenset({"queued", "paused", "cancelled"}),
    "cancelling": frozenset({"cancelled", "succeeded"}),
    "lost": frozenset({"running", "queued", "preempted", "pausing", "paused", "cancelling", "succeeded", "failed"}),
    # People may ask for another attempt; nothing else leads out of an end.
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset({"queued"}),
}
"""Every state, and those that may follow it."""


def before(state: State) -> frozenset[State]:
    """The states that `state` may follow."""
    return frozenset(earlier for earlier, later in NEXT.items() if state in later)
