"""The MoE layer: route every token, then compute its experts by one of the paths of `lamella.moe.paths.choose`.

    y_t = shared(x_t) + sum over chosen e of weight_te * expert_e(x_t) + output_bias

Shapes: T tokens, D model width, E experts, R router rows, n neurons of the shared expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lamella.architecture.moe import ExpertPath, Mode, MoEConfig
from lamella.architecture.moe_tensors import DOWN, GATE_UP, LORA, Kind, lora_name, packed_name
from lamella.errors import UserError
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.expert_parallel import parallel_experts
from lamella.moe.lora import Lora, lora_experts
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import PATHS, apply_experts, gated_ffn
from lamella.moe.provider import AnyExperts, ExpertComputer, ExpertProvider, Resident, experts_in_portions, none_of
from lamella.moe.routing import Routing, analytic_logits, expert_scores, fixed_routing, route, router_logits
from lamella.moe.two_matrix import TwoMatrixExperts, TwoMatrixShared, two_matrix_ffn, two_matrix_path

__all__ = [
    "PATHS", "AnyExperts", "MoEWeights", "Resident", "SharedExpert", "apply_experts", "gated_ffn", "moe_ffn", "packed",
    "packed_lora",
]  # fmt: skip


class SharedExpert(NamedTuple):
    """A gated FFN that every token passes."""

    gate_up_proj: Tensor
    """[2n, D]: the gate rows, then the up rows."""
    down_proj: Tensor
    """[D, n]"""


class MoEWeights(NamedTuple):
    """What one MoE layer computes with; None where its config does not ask for a tensor."""

    router_RD: Tensor
    selection_bias_R: Tensor
    experts: ExpertProvider | ExpertComputer
    """`Resident`, one that hands out experts as they are asked for, or one that computes them itself."""
    router_up_RD: Tensor | None = None
    """Router "analytic"."""
    gate_scale_R: Tensor | None = None
    """Gate "unit"."""
    shared: SharedExpert | TwoMatrixShared | None = None
    output_bias_D: Tensor | None = None
    lora: Lora | None = None
    """Of the frozen experts."""


def packed(experts: nn.Module, kind: Kind) -> AnyExperts:
    """The packed experts of a kind ("frozen" or "trainable") in a module's parameters.

    Where the module has none of that kind, they are tensors [0, ...] of the other kind's shapes.
    """
    if not hasattr(experts, packed_name(kind, DOWN)):
        return none_of(packed(experts, "frozen" if kind == "trainable" else "trainable"))
    cls = Experts if hasattr(experts, packed_name(kind, GATE_UP)) else TwoMatrixExperts
    return cls._make(getattr(experts, packed_name(kind, name)) for name in cls._fields)


def packed_lora(experts: nn.Module) -> Lora | None:
    """The low-rank deltas in a module's parameters, if it has any."""
    if not hasattr(experts, lora_name(LORA[0])):
        return None
    return Lora(*(getattr(experts, lora_name(name)) for name in Lora._fields))


def moe_ffn(
    x_TD: Tensor,
    weights: MoEWeights,
    config: MoEConfig,
    mode: Mode = "routed",
    path: ExpertPath = "auto",
    group: dist.ProcessGroup | None = None,
    twin_share: float | None = None,
) -> tuple[Tensor, Routing, Tensor | None]:
    """The whole MoE layer: (output [T, D], routing, scores [T, E] or None where no router was asked).

    Args:
        x_TD: the tokens' hidden states.
        mode: "routed", or a routing that no router decides; see `lamella.moe.routing.fixed_routing`.
        path: how resident experts are computed; see `lamella.moe.paths.choose`.
        group: the ranks that share out the experts, each with its part in `weights`; None: all are here.
        twin_share: see `lamella.moe.routing.choose_pairs`.

    Raises:
        UserError: the path does not fit the device or the dtype, or computes no low-rank deltas.
    """
    scores_TE = None
    if mode == "routed":
        scores_TE = router_scores(x_TD, weights, config)
        routing = route(scores_TE, weights.selection_bias_R, config, weights.gate_scale_R, twin_share)
    else:
        routing = fixed_routing(x_TD.shape[0], mode, config, x_TD.device)
    if mode == "dense":
        weights = weights._replace(lora=None)
    y_TD = _chosen(x_TD, routing, weights.experts, weights.lora, config, path, group)
    if weights.shared is not None:
        y_TD = _with_shared(y_TD, x_TD, weights.shared, config)
    if weights.output_bias_D is not None:
        y_TD = torch.add(y_TD, weights.output_bias_D, out=y_TD if torch.is_inference_mode_enabled() else None)
    return y_TD, routing, scores_TE


def router_scores(x_TD: Tensor, weights: MoEWeights, config: MoEConfig) -> Tensor:
    """The scores [T, E] of the layer's router, before any selection bias."""
    if weights.router_up_RD is None:
        logits_TR = router_logits(x_TD, weights.router_RD)
    else:
        logits_TR = analytic_logits(x_TD, weights.router_RD, weights.router_up_RD)
    return expert_scores(logits_TR, config)


def _chosen(
    x_TD: Tensor,
    routing: Routing,
    experts: ExpertProvider | ExpertComputer,
    lora: Lora | None,
    config: MoEConfig,
    path: ExpertPath,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The sum [T, D] of the chosen experts' outputs, by their weights."""
    if not isinstance(experts, Resident):
        if lora is not None or group is not None:
            raise UserError(
                "experts that are packed or not all in memory take neither low-rank deltas nor expert parallelism; "
                "keep them in memory as they are"
            )
        if isinstance(experts, ExpertComputer):
            return experts.compute(x_TD, routing, config.activation)
        return experts_in_portions(
            x_TD, routing, experts, lambda x, chosen, part: _computed(x, chosen, part, none_of(part), config, path)
        )
    frozen, trainable = experts
    if lora is None and group is None:
        return _computed(x_TD, routing, frozen, trainable, config, path)
    assert isinstance(frozen, Experts), "refused when the recipe is read"
    assert isinstance(trainable, Experts)
    if group is not None:
        assert lora is None, "refused when the recipe is read"
        return parallel_experts(x_TD, routing, frozen, trainable, config, group, path)
    assert lora is not None
    return lora_experts(x_TD, routing, frozen, trainable, lora, config.lora_scale, path, config.activation)


def _computed(
    x_TD: Tensor, routing: Routing, frozen: AnyExperts, trainable: AnyExperts, config: MoEConfig, path: ExpertPath
) -> Tensor:
    """The same sum of packed experts of either kind, all of them here."""
    if isinstance(frozen, Experts):
        assert isinstance(trainable, Experts)
        return apply_experts(x_TD, routing, frozen, trainable, path, config.activation)
    assert isinstance(trainable, TwoMatrixExperts)
    return two_matrix_path(x_TD, routing, frozen, trainable, config.activation)


def _with_shared(y_TD: Tensor, x_TD: Tensor, shared: SharedExpert | TwoMatrixShared, config: MoEConfig) -> Tensor:
    if not isinstance(shared, SharedExpert):
        return y_TD + two_matrix_ffn(x_TD, *shared, config.activation)
    if not torch.is_inference_mode_enabled() or y_TD.dtype != torch.float32:  # else the product adds to what is there
        return y_TD + gated_ffn(x_TD, *shared, config.activation)
    gate_Tn, up_Tn = F.linear(x_TD, shared.gate_up_proj).chunk(2, dim=-1)
    return y_TD.addmm_(ACTIVATIONS[config.activation](gate_Tn).mul_(up_Tn), shared.down_proj.t())
