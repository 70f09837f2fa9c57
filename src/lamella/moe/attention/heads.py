"""Attention whose heads are experts (the attention MoE of LLaMA-MoE v2, arXiv 2411.15708).

    y_t = sum over the experts e chosen for t of  w_te * O_e attend_e(t)  + b_O

attend_e(t) is softmax attention of expert e's query heads at t over those tokens s <= t that were routed to e too, at
their own rope positions. Expert e holds consecutive query heads of one key/value head: rows of the dense q, k and v
matrices and columns of o, none of which is copied. With all experts chosen and weights 1 this is the dense attention.

`attend_masked` here is the definition: every expert over every token, the others masked.
`lamella.moe.attention.routed` computes only routed rows.

Shapes: B sequences, L tokens of each in this call, T = B*L, S tokens of each with those seen before, D model width,
E experts, K chosen, H head width, A the width of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import AttentionMoEConfig, Mode
from lamella.moe.routing import Routing, gate_scores, gate_weights, router_logits


class Projection(NamedTuple):
    """A linear map: a weight [outputs, inputs] and perhaps a bias [outputs]."""

    weight: Tensor
    bias: Tensor | None = None

    def rows(self, part: int, parts: int) -> Projection:
        """The `part`-th of `parts` equal groups of outputs."""
        return Projection(*(None if p is None else p.unflatten(0, (parts, -1))[part] for p in self))  # type: ignore[arg-type]


class AttentionWeights(NamedTuple):
    """The dense layer's own tensors, and the number of experts."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    head_width: int
    num_experts: int
    q_norm: Callable[[Tensor], Tensor] | None = None
    """Per head, before rope (Qwen3)."""
    k_norm: Callable[[Tensor], Tensor] | None = None

    @property
    def num_kv_heads(self) -> int:
        """The number of key/value heads."""
        return self.k.weight.shape[0] // self.head_width


class Context(NamedTuple):
    """What a call knows about its tokens beside their hidden states."""

    cos_BLH: Tensor
    sin_BLH: Tensor
    mask_BLS: Tensor | None = None
    """bool, which tokens may be seen; its last column is the newest token. None: those that came before."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it."""
    seen: int = 0
    """Tokens per sequence in earlier calls."""

    def real_BL(self) -> Tensor:
        """bool: tokens that may see themselves; padding may not."""
        if self.mask_BLS is None:
            return torch.ones(self.cos_BLH.shape[:2], dtype=torch.bool, device=self.cos_BLH.device)
        L = self.cos_BLH.shape[1]
        return self.mask_BLS[..., -L:].diagonal(dim1=1, dim2=2)


def attention_scores(x_TD: Tensor, router_ED: Tensor, config: AttentionMoEConfig) -> Tensor:
    """The router's scores [T, E], before any selection bias."""
    return gate_scores(router_logits(x_TD, router_ED), config.gate)


def route_attention(
    scores_TE: Tensor, bias_E: Tensor, config: AttentionMoEConfig, gate_scale_E: Tensor | None = None
) -> Routing:
    """Choose by score + bias (equal ones: the lower expert first) and weigh by the score alone."""
    with torch.no_grad():
        order_TE = (scores_TE + bias_E).argsort(dim=-1, descending=True, stable=True)
    expert_ids_TK = order_TE[:, : config.num_experts_per_tok]
    return Routing(expert_ids_TK, gate_weights(scores_TE, expert_ids_TK, config, gate_scale_E))


def fixed_attention_routing(num_tokens: int, mode: Mode, config: AttentionMoEConfig, device: torch.device) -> Routing:
    """Every weight 1: experts drawn by chance (random), else all of them."""
    E, K = config.num_experts, config.num_experts_per_tok
    if mode == "random":
        ids_TK = torch.rand(num_tokens, E, device=device).topk(K, dim=-1).indices
    else:
        ids_TK = torch.arange(E, device=device).expand(num_tokens, E)
    return Routing(ids_TK, torch.ones(ids_TK.shape, device=device))


def expert_weights(routing: Routing, num_experts: int) -> tuple[Tensor, Tensor]:
    """A routing as two tables: (bool [T, E] whether chosen, float32 [T, E] weights, 0 where not)."""
    shape = (routing.expert_ids_TK.shape[0], num_experts)
    chosen_TE = torch.zeros(shape, dtype=torch.bool, device=routing.weights_TK.device)
    weights_TE = routing.weights_TK.new_zeros(shape).scatter(1, routing.expert_ids_TK, routing.weights_TK)
    return chosen_TE.scatter(1, routing.expert_ids_TK, True), weights_TE


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., H] after rope, the halves of a head being the pairs."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attend_masked(x_BLD: Tensor, w: AttentionWeights, routing: Routing, context: Context) -> Tensor:
    """The definition, [B, L, D]: whole matrices of scores, unrouted tokens masked. Without earlier tokens."""
    B, L, _ = x_BLD.shape
    E, H, heads = w.num_experts, w.head_width, w.q.weight.shape[0] // w.head_width
    q, k, v = (F.linear(x_BLD, *p).unflatten(-1, (-1, H)).transpose(1, 2) for p in (w.q, w.k, w.v))
    q, k = (x if norm is None else norm(x) for x, norm in ((q, w.q_norm), (k, w.k_norm)))
    q, k = (rotated(x, context.cos_BLH[:, None], context.sin_BLH[:, None]) for x in (q, k))
    k, v = (x.repeat_interleave(heads // w.num_kv_heads, dim=1) for x in (k, v))
    chosen_TE, weights_TE = expert_weights(routing, E)
    chosen_BEL = (chosen_TE.view(B, L, E) & context.real_BL()[..., None]).transpose(1, 2)
    time_L = torch.arange(L, device=x_BLD.device)
    visible_BELL = in_order(time_L[:, None], time_L, context.window) & chosen_BEL[:, :, None, :]
    if context.mask_BLS is not None:
        visible_BELL = visible_BELL & context.mask_BLS[:, None]
    scores = (q @ k.transpose(2, 3)).float() * H**-0.5
    scores = scores.masked_fill(~visible_BELL.repeat_interleave(heads // E, dim=1), torch.finfo(torch.float32).min)
    out_BLEa = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).unflatten(2, (E, -1)).flatten(3)
    weights_BLE = (weights_TE.view(B, L, E) * chosen_BEL.transpose(1, 2)).to(out_BLEa.dtype)
    return F.linear((out_BLEa * weights_BLE[..., None]).flatten(2), *w.o)


def expert_norms(heads_TA: Tensor, o_DA: Tensor, num_experts: int) -> Tensor:
    """The length [T, E] of each expert's contribution O_e attend_e. A: all heads' widths, the input of o."""
    parts = zip(heads_TA.chunk(num_experts, dim=1), o_DA.chunk(num_experts, dim=1), strict=True)
    return torch.stack([(part_TA @ part_DA.T).norm(dim=1) for part_TA, part_DA in parts], dim=1)


def in_order(query_time: Tensor, key_time: Tensor, window: int | None) -> Tensor:
    """Whether keys are not later than their query, and not older than the window (bool)."""
    ahead = query_time - key_time
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
