"""Low-rank adapters as experts of one gated FFN, never merged: the dense matrices are multiplied once for all of them.

    gate_e = W_g x + B_ge A_ge x     up_e = W_u x + B_ue A_ue x     h_e = silu(gate_e) * up_e
    y = W_d (sum of w_e h_e) + sum of w_e B_de A_de h_e

over the chosen experts e, with A = B = 0 for the zero expert, the last one; an adapter's scale is in its B. With one
expert per token w is 1, and a token of the zero expert gets the dense FFN's bits.

Two paths: `own_tokens` computes an adapter for the tokens that chose it; `all_experts`, for training the router, every
adapter for every token, so that the router's gradient compares all of them (straight-through estimator, arXiv
1308.3432, on the probabilities). Low-rank products are small beside the dense ones.

Shapes: T tokens, D model width, F FFN width, N adapters, E = N + 1 experts, K experts per token, R = T*K routed rows,
r rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.moe.paths.dispatch import Dispatch, dispatch, to_rows
from lamella.moe.routing import Routing, choose_top_k


class LowRank(NamedTuple):
    """The adapters of one matrix [out, in]."""

    a: Tensor
    """[N, r, in]"""
    b: Tensor
    """[N, out, r], the scale of each adapter in it."""


class AdapterFFNWeights(NamedTuple):
    """A dense FFN and its adapters."""

    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    low_gate: LowRank
    low_up: LowRank
    low_down: LowRank


def route_adapters(probs_TE: Tensor, bias_E: Tensor, top_k: int) -> Routing:
    """Choose by probability + bias. One expert has the weight 1, several their probabilities over their sum."""
    with torch.no_grad():
        ids_TK = choose_top_k(probs_TE, bias_E, top_k)
    weights_TK = probs_TE.gather(-1, ids_TK)
    if top_k == 1:
        return Routing(ids_TK, torch.ones_like(weights_TK))
    return Routing(ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True))


def own_tokens(x_TD: Tensor, weights: AdapterFFNWeights, routing: Routing, grouped: bool | None = None) -> Tensor:
    """The output [T, D], each adapter computed for the tokens that chose it alone.

    Args:
        grouped: by grouped products, which wait for no host, or one adapter after another; None: grouped where there
            is a GPU and the rank lets rows start at multiples of 16 bytes.
    """
    product = _grouped if _takes_groups(x_TD, weights.low_gate, grouped) else _loop
    # the zero expert's rows come last, behind those of any product
    d = dispatch(routing.expert_ids_TK, len(weights.low_gate.a) + 1)
    x_RD = x_TD[d.token_N]
    gate_RF = weights.gate(x_TD)[d.token_N] + product(x_RD, weights.low_gate, d)
    up_RF = weights.up(x_TD)[d.token_N] + product(x_RD, weights.low_up, d)
    hidden_RF = F.silu(gate_RF) * up_RF * to_rows(routing.weights_TK.to(x_TD.dtype), d)[:, None]
    delta_RD = product(hidden_RF, weights.low_down, d)
    return weights.down(_summed(hidden_RF, d)) + _summed(delta_RD, d)


def own_low_rank(x_TD: Tensor, low: LowRank, routing: Routing, grouped: bool | None = None) -> Tensor:
    """The sum of w_e B_e A_e x [T, out] over the experts that a token chose, each computed for its own tokens alone.

    This is what adapters of attention's projections add, whose dense output is that of any routing.
    """
    d = dispatch(routing.expert_ids_TK, len(low.a) + 1)
    product = _grouped if _takes_groups(x_TD, low, grouped) else _loop
    return _summed(product(x_TD[d.token_N], low, d) * to_rows(routing.weights_TK.to(x_TD.dtype), d)[:, None], d)


def all_low_rank(x_TD: Tensor, low: LowRank, weights_TE: Tensor) -> Tensor:
    """The sum of w_e B_e A_e x [T, out] over all adapters, by weights [T, E], in one product of rank N * r."""
    N, rank, _ = low.a.shape
    low_TNr = F.linear(x_TD, low.a.flatten(0, 1).to(x_TD.dtype)).unflatten(-1, (N, rank))
    weighed_TR = (low_TNr * weights_TE[:, :N, None].to(x_TD.dtype)).flatten(1)
    return F.linear(weighed_TR, low.b.transpose(0, 1).flatten(1).to(x_TD.dtype))


def one_low_rank(x_TD: Tensor, low: LowRank, index: int) -> Tensor:
    """B A x [T, out] of one adapter; 0 of the zero expert, whose number is N."""
    return x_TD.new_zeros(()) if index == len(low.a) else _one(x_TD, low, index)


def _takes_groups(x_TD: Tensor, low: LowRank, grouped: bool | None) -> bool:
    return grouped if grouped is not None else x_TD.device.type != "cpu" and low.a.shape[1] % 8 == 0


def one_expert(x_TD: Tensor, weights: AdapterFFNWeights, index: int) -> Tensor:
    """The output [T, D] of one expert for every token: of adapter `index`, or of the zero expert, the dense FFN."""
    gate_TF, up_TF = weights.gate(x_TD), weights.up(x_TD)
    if index == len(weights.low_gate.a):
        return weights.down(F.silu(gate_TF) * up_TF)
    hidden_TF = F.silu(gate_TF + _one(x_TD, weights.low_gate, index)) * (up_TF + _one(x_TD, weights.low_up, index))
    return weights.down(hidden_TF) + _one(hidden_TF, weights.low_down, index)


def _summed(rows: Tensor, d: Dispatch) -> Tensor:
    """Rows [R, ...] -> the sum of each token's [T, ...]."""
    return rows[d.slot_TK[:, 0]] if d.slot_TK.shape[1] == 1 else rows[d.slot_TK].sum(1)


def _loop(x_R: Tensor, low: LowRank, d: Dispatch) -> Tensor:
    """B A x of each row's own adapter, 0 for rows of the zero expert."""
    counts = d.ends_E.diff(prepend=d.ends_E.new_zeros(1)).tolist()
    *own, zero = x_R.split(counts)
    parts = [_one(part, low, index) for index, part in enumerate(own)]
    return torch.cat([*parts, x_R.new_zeros(len(zero), low.b.shape[1])])


def _grouped(x_R: Tensor, low: LowRank, d: Dispatch) -> Tensor:
    """The same by grouped products, which leave the rows behind the last group undefined."""
    a, b, ends_N = low.a.to(x_R.dtype), low.b.to(x_R.dtype), d.ends_E[:-1].contiguous()
    exists_R1 = (torch.arange(len(x_R), device=x_R.device) < ends_N[-1])[:, None]
    low_Rr = F.grouped_mm(torch.where(exists_R1, x_R, 0), a.mT, offs=ends_N)
    y_R = F.grouped_mm(torch.where(exists_R1, low_Rr, 0), b.mT, offs=ends_N)
    return torch.where(exists_R1, y_R, 0)


def all_experts(x_TD: Tensor, weights: AdapterFFNWeights, weights_TE: Tensor) -> Tensor:
    """The output [T, D] with every expert computed for every token, by weights [T, E] that may be 0."""
    gate_TF, up_TF = weights.gate(x_TD), weights.up(x_TD)
    hidden_TF, delta_TD = torch.zeros_like(gate_TF), torch.zeros_like(x_TD)
    for e in range(weights_TE.shape[1]):
        weight_T1 = weights_TE[:, e, None].to(x_TD.dtype)
        if e == len(weights.low_gate.a):
            hidden_TF = hidden_TF + weight_T1 * (F.silu(gate_TF) * up_TF)
            continue
        own_gate_TF = gate_TF + _one(x_TD, weights.low_gate, e)
        own_TF = weight_T1 * (F.silu(own_gate_TF) * (up_TF + _one(x_TD, weights.low_up, e)))
        hidden_TF = hidden_TF + own_TF
        delta_TD = delta_TD + _one(own_TF, weights.low_down, e)
    return weights.down(hidden_TF) + delta_TD


def _one(x_T: Tensor, low: LowRank, index: int) -> Tensor:
    return F.linear(F.linear(x_T, low.a[index].to(x_T.dtype)), low.b[index].to(x_T.dtype))


def straight_through(probs_TE: Tensor, routing: Routing) -> Tensor:
    """Weights [T, E]: in value those of the routing, with one expert per token the gradient of all probabilities."""
    hard_TE = torch.zeros_like(probs_TE).scatter(-1, routing.expert_ids_TK, routing.weights_TK.to(probs_TE.dtype))
    if routing.expert_ids_TK.shape[1] > 1:
        return hard_TE
    return hard_TE + (probs_TE - probs_TE.detach())
