"""Low-rank deltas (LoRA, arXiv 2106.09685) on the frozen experts, never merged: without them the dense model is there.

    gate = (W_g + c B_g A_g) x      up = (W_u + c B_u A_u) x      y = (W_d + c B_d A_d) (act(gate) * up)

with c = alpha / rank. B is zero at the start. Two paths: `loop`, and `grouped` with grouped matrix products, which
waits for no host; both under autograd, which forms no gradient of frozen weights, and neither copies them.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, S frozen experts, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import LORA_PATHS, Activation, ExpertPath
from lamella.errors import UserError
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.packed import Experts
from lamella.moe.paths.dispatch import dispatch, to_rows
from lamella.moe.paths.grouped import Half, grouped_fits, split_halves
from lamella.moe.routing import Routing


class Lora(NamedTuple):
    """The deltas of S frozen experts."""

    gate_up_a: Tensor
    """[S, 2r, D]: the r rows of the gate's A, then those of the up matrix's."""
    gate_up_b: Tensor
    """[S, 2f, r]: the f rows of the gate's B, then those of the up matrix's."""
    down_a: Tensor
    """[S, r, f]"""
    down_b: Tensor
    """[S, D, r]"""


def lora_experts(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, lora: Lora, scale: float, path: ExpertPath,
    activation: Activation = "silu",
) -> Tensor:  # fmt: skip
    """The sum of the chosen experts' outputs [T, D], with the deltas on the frozen ones.

    Raises:
        UserError: a path other than those in LORA_PATHS.
    """
    if path == "auto":
        fits = x_TD.device.type != "cpu" and grouped_fits(x_TD, frozen) and lora.down_a.shape[1] % 8 == 0
        path = "grouped" if fits else "loop"
    if path not in LORA_PATHS:
        raise UserError(f"expert path {path!r} computes no LoRA; choose one of {', '.join(LORA_PATHS)}")
    lora = Lora(*(t.to(x_TD.dtype) for t in lora))
    return (_grouped if path == "grouped" else _loop)(x_TD, routing, frozen, trainable, lora, scale, activation)


def _loop(
    x_TD: Tensor,
    routing: Routing,
    frozen: Experts,
    trainable: Experts,
    lora: Lora,
    scale: float,
    activation: Activation,
) -> Tensor:
    """One expert after another, on exactly the tokens that chose it."""
    S, weights_TK = len(frozen.down_proj), routing.weights_TK.to(x_TD.dtype)
    y_TD = torch.zeros_like(x_TD)
    for e in range(S + len(trainable.down_proj)):
        token, k = torch.where(routing.expert_ids_TK == e)
        part, i = (frozen, e) if e < S else (trainable, e - S)
        one = Lora(*(t[i] for t in lora)) if e < S else None
        y_ND = _ffn(x_TD[token], Experts(*(t[i] for t in part)), one, scale, F.linear, activation)
        y_TD = y_TD.index_add(0, token, y_ND * weights_TK[token, k, None])
    return y_TD


def _grouped(
    x_TD: Tensor,
    routing: Routing,
    frozen: Experts,
    trainable: Experts,
    lora: Lora,
    scale: float,
    activation: Activation,
) -> Tensor:
    S, num_experts = len(frozen.down_proj), len(frozen.down_proj) + len(trainable.down_proj)
    d = dispatch(routing.expert_ids_TK, num_experts)
    halves = split_halves(d, to_rows(routing.weights_TK.to(x_TD.dtype), d), S)
    frozen_ND = _half(x_TD, halves[0], frozen, lora, scale, activation)
    if not len(trainable.down_proj):
        return frozen_ND[d.slot_TK].sum(dim=1)
    trainable_ND = _half(x_TD, halves[1], trainable, None, scale, activation)
    count = halves[0].num_rows
    is_frozen = (d.slot_TK < count)[..., None]
    other_TK = (d.slot_TK - count).clamp(min=0)
    return torch.where(is_frozen, frozen_ND[d.slot_TK], trainable_ND[other_TK]).sum(dim=1)


def _half(
    x_TD: Tensor, half: Half, experts: Experts, lora: Lora | None, scale: float, activation: Activation
) -> Tensor:
    """The weighted output rows [N, D]; those beyond the half's last are 0, as products leave them undefined."""

    def product(x: Tensor, weights: Tensor) -> Tensor:
        return F.grouped_mm(x, weights.mT, offs=half.ends_E)

    exists_N1 = (torch.arange(len(half.token_N), device=x_TD.device) < half.num_rows)[:, None]
    x_ND = torch.where(exists_N1, x_TD[half.token_N], 0)
    y_ND = torch.where(exists_N1, _ffn(x_ND, experts, lora, scale, product, activation), 0)
    return y_ND * half.weights_N[:, None]


def _ffn(
    x_ND: Tensor, experts: Experts, lora: Lora | None, scale: float, product: Callable[[Tensor, Tensor], Tensor],
    activation: Activation,
) -> Tensor:  # fmt: skip
    """`product(x, weights)` is x weights^T, of one expert or of all of them, each on its own rows."""
    gate_up_N2f = product(x_ND, experts.gate_up_proj)
    gate_Nf, up_Nf = gate_up_N2f.chunk(2, dim=-1)
    if lora is None:
        return product(ACTIVATIONS[activation](gate_Nf) * up_Nf, experts.down_proj)
    gate_b, up_b = lora.gate_up_b.chunk(2, dim=-2)
    gate_Nr, up_Nr = (part.contiguous() for part in product(x_ND, lora.gate_up_a).chunk(2, dim=-1))
    gate_Nf = gate_Nf + scale * product(gate_Nr, gate_b)
    up_Nf = up_Nf + scale * product(up_Nr, up_b)
    hidden_Nf = ACTIVATIONS[activation](gate_Nf) * up_Nf
    return product(hidden_Nf, experts.down_proj) + scale * product(product(hidden_Nf, lora.down_a), lora.down_b)


def merged(experts: Experts, lora: Lora, scale: float) -> Experts:
    """The experts with their deltas added, in float32: the same function in one tensor each."""
    r = lora.down_a.shape[1]
    gate_up = torch.cat(
        [b @ a for a, b in zip(lora.gate_up_a.float().split(r, 1), lora.gate_up_b.float().chunk(2, 1), strict=True)], 1
    )
    down = lora.down_b.float() @ lora.down_a.float()
    return Experts(experts.gate_up_proj.float() + scale * gate_up, experts.down_proj.float() + scale * down)
