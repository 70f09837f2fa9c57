"""A step whose gradient is not finite changes nothing, on all ranks together.

Adam leaves parameters without a gradient alone, moments and weight decay included: dropping the gradients in the
optimizer's pre-hook is a step that was not taken. The decision is one maximum over all ranks, so that none waits for
another that went on.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lamella.run.failure import Fault


class SkipNonFinite:
    """Looks at the gradients before each optimizer step."""

    def __init__(self, max_in_a_row: int, device: torch.device):
        self.max_in_a_row, self.device = max_in_a_row, device
        self.skipped = False
        """Whether the latest step was skipped."""
        self.in_a_row = 0
        self.total = 0
        """Skipped steps since the start of this process."""

    def look(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Drop the gradients of every rank if one of any rank is not finite; whether the step is skipped."""
        trained = [p for p in parameters if p.grad is not None]
        bad = torch.zeros((), device=self.device)
        if trained and not bool(largest([p.grad for p in trained if p.grad is not None]).isfinite()):
            bad += 1
        dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.skipped = bool(bad)
        if self.skipped:
            for parameter in trained:
                parameter.grad = None
        self.in_a_row = self.in_a_row + 1 if self.skipped else 0
        self.total += self.skipped
        return self.skipped

    def stop_if_hopeless(self, step: int) -> None:
        """Fault of class `numerics`, on every rank, after too many skips in a row."""
        if self.in_a_row >= self.max_in_a_row:
            raise Fault(
                "numerics",
                f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; the last "
                f"checkpoint is from before or unharmed by them. Lower lr, or look at the data of these steps",
            )


def largest(gradients: list[Tensor]) -> Tensor:
    """The largest magnitude in this rank's shards; NaN and infinity show in it."""
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    return torch.nn.utils.get_total_norm([g for g in local if g.numel()], float("inf"))
