"""The MoE layer: route every token, then compute its experts by one of the paths of `lamella.moe.paths`.

Shapes: T tokens, D model width, E experts, R router rows.
"""

from __future__ import annotations

from torch import Tensor

from lamella.config import ExpertPath, Mode, MoEConfig
from lamella.moe.paths import PATHS, apply_experts, gated_ffn
from lamella.moe.routing import Routing, expert_scores, fixed_routing, route, router_logits
from lamella.moe.slicing import Experts

__all__ = ["PATHS", "apply_experts", "gated_ffn", "moe_ffn"]


def moe_ffn(
    x_TD: Tensor,
    router_weight_RD: Tensor,
    bias_R: Tensor,
    frozen: Experts,
    trainable: Experts,
    config: MoEConfig,
    mode: Mode = "routed",
    path: ExpertPath = "auto",
) -> tuple[Tensor, Routing, Tensor | None]:
    """The whole MoE layer: (output [T, D], routing, scores [T, E] or None where no router was asked)."""
    if mode == "routed":
        scores_TE = expert_scores(router_logits(x_TD, router_weight_RD), config)
        routing = route(scores_TE, bias_R, config)
        return apply_experts(x_TD, routing, frozen, trainable, path), routing, scores_TE
    routing = fixed_routing(x_TD.shape[0], mode, config, x_TD.device)
    return apply_experts(x_TD, routing, frozen, trainable, path), routing, None
