"""Where each routed row lies once the rows are sorted by expert, computed without asking the host anything.

All shapes follow from the shapes of the ids: nothing reads a value back, so the device never waits for the host and
`torch.compile` sees one graph. No sort is needed either: an expert's rows keep the order of the tokens, so a row's
place is its expert's start plus the number of earlier tokens that chose the same expert, a running count.

Shapes: T tokens, K active experts, N = T*K routed rows, E experts, S pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamella.moe.routing import Routing


class Dispatch(NamedTuple):
    """The places of the routed rows once they are sorted by expert."""

    slot_TK: Tensor
    """int64: the place of token t's k-th row among the sorted rows."""
    token_N: Tensor
    """int64: the token of each sorted row."""
    ends_E: Tensor
    """int32: where each expert's rows end, frozen experts first; the last is N."""


def dispatch(expert_ids_TK: Tensor, num_experts: int) -> Dispatch:
    """Sort rows by expert, then by token. A token's ids must be distinct, as those of any top-k are."""
    T, K = expert_ids_TK.shape
    device = expert_ids_TK.device
    ids_KT = expert_ids_TK.t()
    chosen_ET = torch.zeros(num_experts, T, dtype=torch.int32, device=device).scatter_(0, ids_KT, 1)
    # experts as rows: a running sum along the contiguous dimension is one block of threads per expert
    running_ET = chosen_ET.cumsum(1, dtype=torch.int32)
    ends_E = running_ET[:, -1].cumsum(0, dtype=torch.int32)
    before_ET = running_ET + (ends_E - running_ET[:, -1])[:, None]
    slot_TK = before_ET.gather(0, ids_KT).t().to(torch.int64, memory_format=torch.contiguous_format) - 1
    token_TK = torch.arange(T, device=device)[:, None].expand(T, K)
    token_N = torch.empty(T * K, dtype=torch.int64, device=device).scatter_(0, slot_TK.flatten(), token_TK.flatten())
    return Dispatch(slot_TK, token_N, ends_E)


def to_rows(values_TK: Tensor, d: Dispatch) -> Tensor:
    """Values [T, K] in the order of the sorted rows, [N]."""
    return torch.empty_like(values_TK.flatten()).scatter_(0, d.slot_TK.flatten(), values_TK.flatten())


def pair_range(routing: Routing, first: int, count: int) -> Routing:
    """The part of a twin routing that pairs first .. first+count-1 compute, with ids local to them.

    Give it to `apply_experts` with those pairs' slices and copies: the outputs of ranges that cover all pairs add up
    to the whole output, so that pairs may lie on different ranks, each with the same number of rows.
    """
    S = routing.expert_ids_TK.shape[1]
    columns = slice(first, first + count)
    ids_TK = routing.expert_ids_TK[:, columns]
    local_TK = ids_TK - first - (S - count) * (ids_TK >= S)
    return Routing(local_TK, routing.weights_TK[:, columns])
