"""The MoE layer: route every token, then compute its experts by one of the paths of `lamella.moe.paths`.

    y_t = shared(x_t) + sum over chosen e of weight_te * expert_e(x_t) + output_bias

Shapes: T tokens, D model width, E experts, R router rows, n neurons of the shared expert.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from lamella.config import ExpertPath, Mode, MoEConfig
from lamella.moe.paths import PATHS, apply_experts, gated_ffn
from lamella.moe.routing import Routing, analytic_logits, expert_scores, fixed_routing, route, router_logits
from lamella.moe.slicing import Experts

__all__ = ["PATHS", "MoEWeights", "SharedExpert", "apply_experts", "gated_ffn", "moe_ffn", "packed"]


class SharedExpert(NamedTuple):
    """A gated FFN that every token passes."""

    gate_up_proj: Tensor
    """[2n, D]: the gate rows, then the up rows."""
    down_proj: Tensor
    """[D, n]"""


class MoEWeights(NamedTuple):
    """All tensors of one MoE layer; None where its config does not ask for one."""

    router_RD: Tensor
    selection_bias_R: Tensor
    frozen: Experts
    trainable: Experts
    router_up_RD: Tensor | None = None
    """Router "analytic"."""
    gate_scale_R: Tensor | None = None
    """Gate "unit"."""
    shared: SharedExpert | None = None
    output_bias_D: Tensor | None = None


def packed(experts: nn.Module, kind: str) -> Experts:
    """The experts of a kind; none of them is [0, ...] of the other kind's shape."""
    if hasattr(experts, f"{kind}_down_proj"):
        return Experts(getattr(experts, f"{kind}_gate_up_proj"), getattr(experts, f"{kind}_down_proj"))
    other = packed(experts, "frozen" if kind == "trainable" else "trainable")
    return Experts(other.gate_up_proj[:0], other.down_proj[:0])


def moe_ffn(
    x_TD: Tensor, weights: MoEWeights, config: MoEConfig, mode: Mode = "routed", path: ExpertPath = "auto"
) -> tuple[Tensor, Routing, Tensor | None]:
    """The whole MoE layer: (output [T, D], routing, scores [T, E] or None where no router was asked)."""
    scores_TE = None
    if mode == "routed":
        scores_TE = expert_scores(_logits(x_TD, weights), config)
        routing = route(scores_TE, weights.selection_bias_R, config, weights.gate_scale_R)
    else:
        routing = fixed_routing(x_TD.shape[0], mode, config, x_TD.device)
    y_TD = apply_experts(x_TD, routing, weights.frozen, weights.trainable, path)
    if weights.shared is not None:
        y_TD = y_TD + gated_ffn(x_TD, *weights.shared)
    if weights.output_bias_D is not None:
        y_TD = y_TD + weights.output_bias_D
    return y_TD, routing, scores_TE


def _logits(x_TD: Tensor, weights: MoEWeights) -> Tensor:
    if weights.router_up_RD is None:
        return router_logits(x_TD, weights.router_RD)
    return analytic_logits(x_TD, weights.router_RD, weights.router_up_RD)
