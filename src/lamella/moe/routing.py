"""Which experts a token goes to, and with what weight.

Twin routing: a router row per pair of experts. The trainable copy i gets the logit l_i, its frozen slice -l_i, and
likewise the selection biases b_i and -b_i. Sigmoid scores of a pair then add up to 1, the larger biased score of
every pair is at least 1/2 and the smaller at most 1/2: a plain top-S of the 2S experts picks exactly one of each
pair, and sums every slice of the FFN once. Flat routing: an ordinary top-k over all experts.

In both, experts are chosen by score + bias and weighted by the score alone (arXiv 2408.15664).

Shapes: T tokens, D model width, S slices, E experts (frozen 0 .. S-1, then trainable), K active experts, R router
rows (S for twin, E for flat).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import GateKind, Mode, MoEConfig


class Gating(Protocol):
    """What the weights of the chosen experts depend on: a MoEConfig, or that of attention experts."""

    @property
    def gate(self) -> GateKind: ...

    @property
    def norm_topk_prob(self) -> bool: ...

    @property
    def route_scale(self) -> float: ...


class Routing(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    expert_ids_TK: Tensor
    """int64; in twin routing column i holds i (the slice) or S + i (its copy)."""
    weights_TK: Tensor
    """float32 gate weights."""

    def detached(self) -> Routing:
        """The same values without their graph: who keeps a routing must not keep the activations of its layer alive."""
        return Routing(self.expert_ids_TK, self.weights_TK.detach())


def router_logits(x_TD: Tensor, weight_RD: Tensor) -> Tensor:
    """The logits [T, R] in float32 whatever the inputs' dtype: in bf16 choices of equal models would differ."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), weight_RD.float())


def analytic_logits(x_TD: Tensor, gate_RD: Tensor, up_RD: Tensor) -> Tensor:
    """The logits [T, R] |silu(gate x) * (up x)|: how strongly each expert's representative neuron fires (arXiv
    2502.04416).
    """
    return (F.silu(router_logits(x_TD, gate_RD)) * router_logits(x_TD, up_RD)).abs()


def expert_scores(logits_TR: Tensor, config: MoEConfig) -> Tensor:
    """The scores [T, E] from router logits; twin routing mirrors these first: slices get -l, copies l."""
    logits_TE = torch.cat([-logits_TR, logits_TR], dim=-1) if config.routing == "twin" else logits_TR
    return gate_scores(logits_TE, config.gate)


def gate_scores(logits_TE: Tensor, gate: GateKind) -> Tensor:
    """The scores [T, E] from logits, by the kind of gate.

    Gate "unit" chooses by the logits themselves: a sigmoid would round large ones to ties.
    """
    if gate == "unit":
        return logits_TE
    return logits_TE.sigmoid() if gate == "sigmoid" else logits_TE.softmax(dim=-1)


def pair_margins(scores_TE: Tensor) -> Tensor:
    """How much each copy's score exceeds its slice's, [T, S] in [-1, 1]."""
    frozen_TS, trainable_TS = scores_TE.chunk(2, dim=-1)
    return trainable_TS - frozen_TS


def choose_pairs(scores_TE: Tensor, bias_S: Tensor, twin_share: float | None = None) -> Tensor:
    """The chosen ids [T, S], one of each pair: the copy where score + bias exceeds the slice's score - bias, at ties
    the slice. With `twin_share` at most this share of a token's pairs take the copy: those where it exceeds most.
    """
    S = bias_S.shape[0]
    slice_ids = torch.arange(S, device=scores_TE.device)
    excess_TS = pair_margins(scores_TE) + 2 * bias_S
    takes_copy_TS = excess_TS > 0
    if twin_share is not None:
        order_TS = excess_TS.argsort(dim=-1, descending=True, stable=True)
        takes_copy_TS = takes_copy_TS.scatter(1, order_TS[:, round(twin_share * S) :], False)
    return slice_ids + S * takes_copy_TS


def choose_top_k(scores_TE: Tensor, bias_E: Tensor, top_k: int) -> Tensor:
    """The ids [T, K] of the largest score + bias."""
    return torch.topk(scores_TE + bias_E, top_k, dim=-1, sorted=False).indices


def choice_margins(scores_TE: Tensor, bias_R: Tensor, config: MoEConfig) -> Tensor:
    """[T]: how near each token is to another choice of experts, in biased scores; infinite where there is no other."""
    if config.routing == "twin":
        return (pair_margins(scores_TE) + 2 * bias_R).abs().amin(dim=-1)
    K = config.num_experts_per_tok
    if scores_TE.shape[-1] == K:
        return scores_TE.new_full(scores_TE.shape[:1], torch.inf)
    best_TK = torch.topk(scores_TE + bias_R, K + 1, dim=-1).values
    return best_TK[:, K - 1] - best_TK[:, K]


def gate_weights(
    scores_TE: Tensor, expert_ids_TK: Tensor, config: Gating, gate_scale_E: Tensor | None = None
) -> Tensor:
    """[T, K] weights of the chosen experts: their scores, normalised if the config says so, times route_scale.

    Gate "unit": 1 + u_e sigmoid(score_e), with u = `gate_scale_E`.
    """
    weights_TK = scores_TE.gather(-1, expert_ids_TK)
    if config.gate == "unit":
        assert gate_scale_E is not None
        return 1 + gate_scale_E.float()[expert_ids_TK] * weights_TK.sigmoid()
    if config.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK * config.route_scale


def route(
    scores_TE: Tensor,
    bias_R: Tensor,
    config: MoEConfig,
    gate_scale_E: Tensor | None = None,
    twin_share: float | None = None,
) -> Routing:
    """Choose and weigh experts.

    Args:
        bias_R: float32; it takes no gradient.
        gate_scale_E: belongs to gate "unit".
        twin_share: see `choose_pairs`. A slice that stands in for its copy has the copy's weight: its own is small just
            because the copy was preferred, and the others would outweigh it.
    """
    with torch.no_grad():
        if config.routing == "twin":
            expert_ids_TK = choose_pairs(scores_TE, bias_R, twin_share)
            weighed_TK = expert_ids_TK if twin_share is None else choose_pairs(scores_TE, bias_R)
        else:
            weighed_TK = expert_ids_TK = choose_top_k(scores_TE, bias_R, config.num_experts_per_tok)
    return Routing(expert_ids_TK, gate_weights(scores_TE, weighed_TK, config, gate_scale_E))


def with_top_k(config: MoEConfig, top_k: int) -> MoEConfig:
    """The flat-routing config with another number of experts per token, for an output of the same scale.

    Normalised weights add up to `route_scale` for any number; others are scaled by the ratio. Gate "unit" is left
    alone: its experts are parts of one FFN at weight 1, and all of them together are the dense FFN.
    """
    scale = config.route_scale
    if not config.norm_topk_prob:
        scale *= config.num_experts_per_tok / top_k
    return dataclasses.replace(config, num_experts_per_tok=top_k, route_scale=scale)


def fixed_routing(num_tokens: int, mode: Mode, config: MoEConfig, device: torch.device) -> Routing:
    """Routing that no router decides, every weight 1: all slices (dense), all copies (learned), or chance (random).

    Without frozen slices, "dense" is every expert.
    """
    S, E, K = config.num_frozen_experts, config.num_experts, config.num_experts_per_tok
    if mode == "dense":
        ids_TK = torch.arange(S or E, device=device).expand(num_tokens, S or E)
    elif mode == "learned":
        ids_TK = torch.arange(S, E, device=device).expand(num_tokens, E - S)
    elif config.routing == "twin":
        ids_TK = torch.arange(S, device=device) + S * torch.randint(2, (num_tokens, S), device=device)
    else:
        ids_TK = torch.rand(num_tokens, E, device=device).topk(K, dim=-1).indices
    return Routing(ids_TK, torch.ones(ids_TK.shape, device=device))
