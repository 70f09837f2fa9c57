"""Which tokens each token may see: itself and what precedes it in its document, within the model's window.

Shapes: B batch, L tokens of a sample, l = L/P of them on one of P ranks of context parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torchtitan.models.common.attention import AttentionMasksType

from lamella.titan.context import ContextShare

Masks: TypeAlias = Tensor | AttentionMasksType | None
"""What an inner attention is given: bool [B, 1, l, L] for sdpa, torchtitan's own objects for flex and varlen."""


@dataclass(frozen=True)
class MasksByWindow:
    """The masks of a decoder whose layers differ in their window."""

    by_window: dict[int | None, Masks]


def masks_of(masks: Masks | MasksByWindow, window: int | None) -> Masks:
    """Those of a layer with this window."""
    return masks.by_window[window] if isinstance(masks, MasksByWindow) else masks


class MaskMod(Protocol):
    """FlexAttention's question: may query `q` of sample `b` see key `k`? (bool, of the broadcast shape)"""

    def __call__(self, b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor: ...


def document_mask(positions_BL: Tensor, window: int | None = None, context: ContextShare | None = None) -> Tensor:
    """What each token sees, bool [B, 1, L, L]: itself and what precedes it in its document, at most `window` tokens.

    With a context share it is [B, 1, l, L]: this rank's tokens as rows, columns in the order of the ranks.
    """
    B, L = positions_BL.shape
    device = positions_BL.device
    batch, every = (torch.arange(n, device=device) for n in (B, L))
    rows, columns = (every, every) if context is None else (context.mine(L, device), context.order(L, device))
    sees = document_mask_mod(positions_BL, window, rows, columns)
    queries = torch.arange(len(rows), device=device)[:, None]
    return sees(batch[:, None, None, None], torch.zeros_like(batch[:1]), queries, every)


def document_mask_mod(positions_BL: Tensor, window: int | None, rows: Tensor, columns: Tensor) -> MaskMod:
    """The same mask as a function, as FlexAttention wants it.

    Args:
        rows, columns: the tokens that the queries and the keys are.
    """
    document_BL = (positions_BL == 0).cumsum(dim=1)

    def sees(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        query, key = rows[q], columns[k]
        near = (query >= key) if window is None else (query >= key) & (query - key < window)
        return near & (document_BL[b, query] == document_BL[b, key])

    return sees
