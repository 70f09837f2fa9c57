"""Expert parallelism: P ranks hold 1/P of a layer's experts each, and each computes them for the tokens of all P.

Tokens are gathered, outputs summed and scattered back. In twin routing every token needs every pair, so every rank
needs all tokens: this moves exactly what has to move. Bytes that one rank receives in a forward pass, of b bytes a
number, for T tokens of its own and width D:

    gathering        (P-1) T D b   (+ 12 bytes a token and active expert for ids and weights)
    summing          (P-1) T D b   (a ring reduction; partial sums, not rows)

and as much again in the backward pass. Sending each routed row by itself (all-to-all) moves K/P times as much for K
active experts. All shapes are fixed in twin routing; in flat routing the number of rows of a rank depends on the
text, and is asked from the device once per layer.

Shapes: T tokens of this rank, P ranks, G = P*T tokens of all, K active experts, D model width, N rows computed here.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import ExpertPath, MoEConfig
from lamella.moe.collectives import gather_rows, sum_scatter_rows
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import apply_experts
from lamella.moe.paths.dispatch import pair_range
from lamella.moe.routing import Routing


def parallel_experts(
    x_TD: Tensor,
    routing: Routing,
    frozen: Experts,
    trainable: Experts,
    config: MoEConfig,
    group: dist.ProcessGroup,
    path: ExpertPath = "auto",
) -> Tensor:
    """The sum of the chosen experts' outputs [T, D], as `apply_experts` gives it with the experts of all ranks.

    Rank r holds the r-th part of the frozen experts and the r-th of the trainable ones, a slice and its twin together;
    `frozen` and `trainable` are this rank's.
    """
    x_GD = gather_rows(x_TD, group)
    ids_GK = gather_rows(routing.expert_ids_TK, group)
    everyones = Routing(ids_GK, gather_rows(routing.weights_TK, group))
    rank = group.rank()
    if config.routing == "twin":
        count = len(frozen.down_proj)
        own = pair_range(everyones, rank * count, count)
        y_GD = apply_experts(x_GD, own, frozen, trainable, path, config.activation)
    else:
        y_GD = _own_rows(x_GD, everyones, frozen, trainable, config, rank, path)
    return sum_scatter_rows(y_GD, group)


def _own_rows(
    x_GD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, config: MoEConfig, rank: int, path: ExpertPath
) -> Tensor:
    """The outputs of this rank's experts, summed per token: each routed row is a token with one expert."""
    local_GK = local_ids(routing.expert_ids_TK, config, rank, len(frozen.down_proj), len(trainable.down_proj))
    token_N, k_N = torch.where(local_GK >= 0)
    ids_N, weights_N = local_GK[token_N, k_N], routing.weights_TK[token_N, k_N]
    # one more row, of weight 0: a rank whose experts nobody chose has something to compute all the same
    token_N, ids_N, weights_N = (F.pad(values_N, (0, 1)) for values_N in (token_N, ids_N, weights_N))
    rows = Routing(ids_N[:, None], weights_N[:, None])
    y_ND = apply_experts(x_GD[token_N], rows, frozen, trainable, path, config.activation)
    return torch.zeros_like(x_GD).index_add(0, token_N, y_ND)


def local_ids(ids_GK: Tensor, config: MoEConfig, rank: int, num_frozen: int, num_trainable: int) -> Tensor:
    """Ids of all experts -> ids of this rank's: frozen 0 .. num_frozen-1, then trainable; -1 for other ranks'."""
    S = config.num_frozen_experts
    frozen_GK, trainable_GK = ids_GK - rank * num_frozen, ids_GK - S - rank * num_trainable
    is_frozen = (ids_GK < S) & (frozen_GK >= 0) & (frozen_GK < num_frozen)
    is_trainable = (ids_GK >= S) & (trainable_GK >= 0) & (trainable_GK < num_trainable)
    return torch.where(is_frozen, frozen_GK, torch.where(is_trainable, trainable_GK + num_frozen, -1))
