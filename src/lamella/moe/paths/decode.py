"""One token, or a few, on a CPU: products with the chosen experts' weights alone and few calls beside them.

A matrix product of few rows takes as long as reading its weights, some 50 us for an expert of a small model, so each
further call counts: what is elementwise is computed once for the rows of all experts.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.packed import Experts
from lamella.moe.routing import Routing
from lamella.moe.routing_one import Chosen

MOST_ROWS = 256
"""N up to which `few_experts` is used; above, one expert's rows at a time stay in cache (`tiled`)."""


def decode_path(
    x_1D: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """One token's output [1, D], for inference: nothing is kept for a backward pass."""
    gate_up, down = (f.unbind(0) + t.unbind(0) for f, t in zip(frozen, trainable, strict=True))
    y_1D = torch.zeros_like(x_1D)
    chosen = Chosen(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist())
    add_experts(y_1D[0], x_1D[0], chosen, [gate_up[e] for e in chosen.expert_ids],
                [down[e] for e in chosen.expert_ids], activation)  # fmt: skip
    return y_1D


def add_experts(
    y_D: Tensor,
    x_D: Tensor,
    chosen: Chosen,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: Activation = "silu",
) -> None:
    """Add one token's output to `y_D`; the matrices [2f, D] and [D, f] are those of the chosen experts, in order."""
    gate_up_K2f = x_D.new_empty(len(gate_up), gate_up[0].shape[0])
    for matrix, row_2f in zip(gate_up, gate_up_K2f.unbind(0), strict=True):
        torch.mv(matrix, x_D, out=row_2f)
    add_down(y_D, gate_up_K2f, chosen.weights, down, activation)


def add_down(
    y_D: Tensor, gate_up_K2f: Tensor, weights: Sequence[float], down: Sequence[Tensor], activation: Activation
) -> None:
    """Add what the chosen experts make of their gate's and up's rows to `y_D`."""
    hidden_Kf = weighed_hidden(gate_up_K2f, weights, activation)
    for matrix, hidden_f in zip(down, hidden_Kf.unbind(0), strict=True):
        y_D.addmv_(matrix, hidden_f)


def weighed_hidden(gate_up_K2f: Tensor, weights: Sequence[float], activation: Activation) -> Tensor:
    """The hidden activations [K, f] of the chosen experts, times their weights."""
    gate_Kf, up_Kf = gate_up_K2f.chunk(2, dim=-1)
    hidden_Kf = ACTIVATIONS[activation](gate_Kf).mul_(up_Kf)
    if any(weight != 1 for weight in weights):
        hidden_Kf.mul_(torch.tensor(weights, dtype=hidden_Kf.dtype)[:, None])
    return hidden_Kf


def few_experts(
    x_TD: Tensor,
    routing: Routing,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: Activation = "silu",
) -> Tensor:
    """A few tokens' outputs [T, D], for inference; the matrices are those of all experts."""
    T, K = routing.expert_ids_TK.shape
    ids_N = routing.expert_ids_TK.flatten().tolist()
    order_N = sorted(range(len(ids_N)), key=ids_N.__getitem__)
    spans = _spans([ids_N[n] for n in order_N])
    order = torch.tensor(order_N)
    rows_ND = x_TD.index_select(0, order.div(K, rounding_mode="floor"))
    gate_up_N2f = x_TD.new_empty(len(ids_N), gate_up[ids_N[0]].shape[0])
    for e, span in spans:
        torch.mm(rows_ND[span], gate_up[e].t(), out=gate_up_N2f[span])
    gate_Nf, up_Nf = gate_up_N2f.chunk(2, dim=-1)
    weights_N1 = routing.weights_TK.to(x_TD.dtype).flatten().index_select(0, order)[:, None]
    hidden_Nf = ACTIVATIONS[activation](gate_Nf).mul_(up_Nf).mul_(weights_N1)
    for e, span in spans:
        torch.mm(hidden_Nf[span], down[e].t(), out=rows_ND[span])
    return torch.empty_like(rows_ND).index_copy_(0, order, rows_ND).view(T, K, -1).sum(dim=1)


def _spans(sorted_ids_N: Sequence[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for each that has some."""
    spans, start = [], 0
    for n, e in enumerate(sorted_ids_N):
        if n + 1 == len(sorted_ids_N) or sorted_ids_N[n + 1] != e:
            spans.append((e, slice(start, n + 1)))
            start = n + 1
    return spans
