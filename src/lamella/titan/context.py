"""Context parallelism: P ranks share out the tokens of each sample; attention gathers their keys and values.

Each rank keeps its queries and gets all keys and values: (P-1)/P of 2 B L G H numbers per layer, and the gradients of
as many back. A causal mask gives late tokens more to do than early ones, so a rank takes one chunk from the front and
its mirror from the back (head and tail, as in Llama 3, arXiv 2407.21783).

Shapes: B samples, L tokens of a sample, l = L/P of this rank, N heads, G key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lamella.moe.collectives import gather_rows


@dataclass(frozen=True)
class ContextShare:
    """One rank's part of every sample."""

    rank: int
    size: int

    def order(self, length: int, device: torch.device | None = None) -> Tensor:
        """[L]: the tokens as the ranks hold them, rank after rank. `length` is a multiple of 2 * size."""
        chunks = torch.arange(length, device=device).chunk(2 * self.size)
        return torch.cat([c for r in range(self.size) for c in (chunks[r], chunks[-1 - r])])

    def mine(self, length: int, device: torch.device | None = None) -> Tensor:
        """[l]: this rank's tokens."""
        return self.order(length, device).chunk(self.size)[self.rank]

    def part(self, x_BL: Tensor) -> Tensor:
        """[B, L] -> [B, l]"""
        return x_BL[:, self.mine(x_BL.shape[1], x_BL.device)]


def with_all_keys(attend: Callable[..., Tensor], group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """Of an inner attention, one that first gathers keys and values, in the order of `ContextShare.order`."""

    def attend_to_all(q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor, **options: Any) -> Tensor:
        kv_l = torch.stack((k_BlGH, v_BlGH)).movedim(2, 0)
        k_BLGH, v_BLGH = gather_rows(kv_l, group).movedim(0, 2).unbind(0)
        return attend(q_BlNH, k_BLGH, v_BLGH, **options)

    return attend_to_all
