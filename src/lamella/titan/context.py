"""Context parallelism: P ranks share out the tokens of each sample; attention gathers their keys and values.

Each rank keeps its queries and gets all keys and values: (P-1)/P of 2 B L G H numbers per layer, and the gradients of
as many back. A causal mask gives late tokens more to do than early ones, so a rank takes one chunk from the front and
its mirror from the back (head and tail, as in Llama 3, arXiv 2407.21783).

Shapes: B samples, L tokens of a sample, l = L/P of this rank, N heads, G key/value heads, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        """The tokens as the ranks hold them, rank after rank, [L]. `length` is a multiple of 2 * size."""
        chunks = torch.arange(length, device=device).chunk(2 * self.size)
        return torch.cat([c for r in range(self.size) for c in (chunks[r], chunks[-1 - r])])

    def mine(self, length: int, device: torch.device | None = None) -> Tensor:
        """The indices [l] of this rank's tokens."""
        return self.order(length, device).chunk(self.size)[self.rank]

    def part(self, x_BL: Tensor) -> Tensor:
        """The part [B, l] of x [B, L] that is this rank's."""
        return x_BL[:, self.mine(x_BL.shape[1], x_BL.device)]


def all_keys(k_BlGH: Tensor, v_BlGH: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values [B, L, G, H] of all ranks' tokens, in the order of `ContextShare.order`."""
    kv_l = torch.stack((k_BlGH, v_BlGH)).movedim(2, 0)
    k_BLGH, v_BLGH = gather_rows(kv_l, group).movedim(0, 2).unbind(0)
    return k_BLGH, v_BLGH
