"""All choices about one layer, made from its sample: parts, router, gate, balance, and what is added to the output.

Symbols as in `lamella.calibrate.sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lamella.architecture.moe import Activation, MoEConfig
from lamella.architecture.sizes import Parts
from lamella.calibrate.sample import FFN, LayerSample, Partition, RouterInit, membership, router_logits
from lamella.conversion.partition import PARTITIONS, ROUTERS
from lamella.conversion.partition.align import alignment, residual_bias
from lamella.conversion.partition.reconstruct import dense_output, masked_hidden
from lamella.conversion.partition.refit import refit_down
from lamella.conversion.partition.search import search_shared
from lamella.moe.balancing import balanced_bias
from lamella.moe.experts import AnyExperts, MoEWeights, Resident, SharedExpert, moe_ffn
from lamella.moe.packed import Experts
from lamella.moe.provider import none_of
from lamella.moe.routing import analytic_logits, expert_scores, gate_scores, route
from lamella.moe.routing import router_logits as token_logits
from lamella.moe.two_matrix import TwoMatrixExperts, TwoMatrixShared
from lamella.recipe.methods.partition import Axes

# Normalised gates are 1 at the start only as far as the scores are equal: within 0.005 nats of unit gates up to a
# standard deviation of the logits of 0.5.
LOGIT_STD = {"unit": 1.0, "normalised": 0.1, "softmax": 0.1}


class Decision(NamedTuple):
    """What a layer becomes; small tensors, float32 and int64."""

    shared_n: Tensor
    experts_Ef: Tensor
    router_ED: Tensor
    selection_bias_E: Tensor
    num_chosen: Tensor
    """K, a single int64."""
    router_up_ED: Tensor | None = None
    output_bias_D: Tensor | None = None
    row_scale_D: Tensor | None = None
    """Factor on the rows of the down projections."""
    down_DF: Tensor | None = None
    """Takes the dense down projection's place."""

    def to_dict(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


class Split(NamedTuple):
    """Which neurons make an expert, and who chooses it: the slow half of a decision."""

    partition: Partition
    router: RouterInit

    def to_dict(self) -> dict[str, Tensor]:
        tensors = self.partition._asdict() | self.router._asdict()
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Split:
        """As `to_dict` gave them."""
        router = {name: tensor for name, tensor in tensors.items() if name not in Partition._fields}
        return cls(Partition(tensors["shared_n"], tensors["experts_Ef"]), RouterInit(**router))


def decide(sample: LayerSample, axes: Axes, generator: torch.Generator) -> Decision:
    """UserError if the sample lacks what the axes need."""
    return finish(sample, axes, split(sample, axes, generator))


def split(sample: LayerSample, axes: Axes, generator: torch.Generator) -> Split:
    parts = _parts(sample, axes, generator)
    partition = PARTITIONS[axes.neurons](sample, parts, generator)
    return Split(partition, ROUTERS[axes.router](sample, partition, parts.num_chosen, generator))


def finish(sample: LayerSample, axes: Axes, split: Split) -> Decision:
    """Gate, balance and output. Neither the split nor the sample need be of the axes' own names: a split of one sample
    can be finished on another."""
    decision = _routed(sample, split.partition, split.router, axes)
    if axes.all_active or axes.output == "plain":
        return decision
    return _corrected(sample, decision, axes)


def layer_fields(decision: Decision, axes: Axes) -> dict[str, Any]:
    """The fields of MoEConfig that may differ from layer to layer."""
    chosen = int(decision.num_chosen)
    return {
        "num_trainable_experts": len(decision.experts_Ef),
        "num_experts_per_tok": chosen,
        "shared_intermediate_size": len(decision.shared_n),
        "route_scale": float(chosen) if axes.scale_factor is None else axes.scale_factor,
    }


def layer_config(
    decision: Decision, axes: Axes, gated: bool = True, activation: Activation = "silu", layer: int = 0
) -> MoEConfig:
    """The config of this layer alone; `gated` and `activation` are the dense FFN's."""
    return MoEConfig(
        num_frozen_experts=0,
        moe_intermediate_size=decision.experts_Ef.shape[1],
        moe_layers=(layer,),
        routing="flat",
        gate={"unit": "unit", "normalised": "sigmoid", "softmax": "softmax"}[axes.gate],  # type: ignore[arg-type]
        router="linear" if decision.router_up_ED is None else "analytic",
        output_bias=decision.output_bias_D is not None,
        gated=gated,
        activation=activation,
        **layer_fields(decision, axes),
    )


def layer_weights(ffn: FFN, decision: Decision) -> MoEWeights:
    """The converted layer's tensors, gathered from the dense ones."""
    ids_Ef, shared_n, down_DF = decision.experts_Ef, decision.shared_n, converted_ffn(ffn, decision).down_DF
    experts: AnyExperts
    shared: SharedExpert | TwoMatrixShared
    down_EDf, down_Dn = down_DF[:, ids_Ef].transpose(0, 1).contiguous(), down_DF[:, shared_n].contiguous()
    if ffn.gate_FD is not None:
        experts = Experts(torch.cat([ffn.gate_FD[ids_Ef], ffn.up_FD[ids_Ef]], dim=1), down_EDf)
        shared = SharedExpert(torch.cat([ffn.gate_FD[shared_n], ffn.up_FD[shared_n]]), down_Dn)
    else:
        assert ffn.up_bias_F is not None
        experts = TwoMatrixExperts(ffn.up_FD[ids_Ef], ffn.up_bias_F[ids_Ef], down_EDf)
        shared = TwoMatrixShared(ffn.up_FD[shared_n], ffn.up_bias_F[shared_n], down_Dn)
    return MoEWeights(
        decision.router_ED, decision.selection_bias_E, Resident(none_of(experts), experts), decision.router_up_ED,
        torch.zeros(len(ids_Ef)), shared if len(shared_n) else None, decision.output_bias_D,
    )  # fmt: skip


def converted_layer(ffn: FFN, decision: Decision, axes: Axes) -> Callable[[Tensor], Tensor]:
    """x [t, D] -> y [t, D] of the layer with its experts."""
    run = _layer(ffn, decision, axes)
    return lambda x_TD: run(x_TD)[0]


def converted_ffn(ffn: FFN, decision: Decision) -> FFN:
    """The dense FFN with the matrices and the output bias that the decision gives it."""
    down_DF = ffn.down_DF if decision.down_DF is None else decision.down_DF
    if decision.row_scale_D is not None:
        down_DF = down_DF * decision.row_scale_D[:, None]
    return ffn._replace(down_DF=down_DF, down_bias_D=decision.output_bias_D)


def neuron_counts(ffn: FFN, decision: Decision, axes: Axes) -> Callable[[Tensor], Tensor]:
    """x [t, D] -> how much of each neuron the converted layer adds up, [t, F]: what its experts are weighed by, and 1
    for a shared neuron."""
    config = layer_config(decision, axes, ffn.gate_FD is not None, ffn.activation)  # type: ignore[arg-type]
    member_EF = membership(Partition(decision.shared_n, decision.experts_Ef), len(ffn.up_FD))
    shared_F = torch.zeros(len(ffn.up_FD)).index_fill_(0, decision.shared_n, 1.0)
    gate_scale_E = torch.zeros(len(member_EF))

    def counts(x_TD: Tensor) -> Tensor:
        here = x_TD.device
        up_ED = decision.router_up_ED
        if up_ED is None:
            logits_TE = token_logits(x_TD, decision.router_ED.to(here))
        else:
            logits_TE = analytic_logits(x_TD, decision.router_ED.to(here), up_ED.to(here))
        scores_TE = expert_scores(logits_TE, config)
        ids_TK, weights_TK = route(scores_TE, decision.selection_bias_E.to(here), config, gate_scale_E.to(here))
        return torch.zeros_like(scores_TE).scatter_(1, ids_TK, weights_TK) @ member_EF.to(here) + shared_F.to(here)

    return counts


def routed_output(sample: LayerSample, decision: Decision, axes: Axes) -> tuple[Tensor, Tensor]:
    """(y [T, D], the experts [T, K] that the sample's tokens choose)"""
    return _layer(sample.ffn, decision, axes)(sample.x_TD)


def _layer(ffn: FFN, decision: Decision, axes: Axes) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    config = layer_config(decision, axes, ffn.gate_FD is not None, ffn.activation)  # type: ignore[arg-type]
    weights = layer_weights(ffn, decision)

    def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_TD, routing, _ = moe_ffn(x_TD, weights, config)
        return y_TD, routing.expert_ids_TK

    return run


def _parts(sample: LayerSample, axes: Axes, generator: torch.Generator) -> Parts:
    axes.check(sample.ffn.up_FD.shape[0])
    if axes.fixed_shared is not None:
        return Parts(axes.parts, axes.fixed_shared, axes.active)
    candidates = {round(i * (axes.active - 1) / 4) for i in range(5)}
    found, _ = search_shared(
        sample, axes.parts, axes.active, PARTITIONS[axes.neurons], ROUTERS[axes.router], generator, sorted(candidates)
    )
    return Parts(axes.parts, found, axes.active)


def _routed(sample: LayerSample, partition: Partition, router: RouterInit, axes: Axes) -> Decision:
    """The router scaled to the gate's spread of logits, its intercept moved into the selection bias."""
    scale = _logit_scale(sample, router, axes)
    weight_ED, up_ED = router.weight_ED, router.up_ED
    if up_ED is None:
        weight_ED = weight_ED * scale
    else:
        up_ED = up_ED * scale
    scaled = RouterInit(weight_ED, torch.zeros_like(router.bias_E), up_ED)
    # Near 0 a sigmoid rises by 1/4 of its logit, a softmax over E by 1/E.
    slope = {"unit": 1.0, "normalised": 0.25, "softmax": 1 / len(partition.experts_Ef)}[axes.gate]
    bias_E = router.bias_E * scale * slope
    chosen = axes.active - len(partition.shared_n) // partition.experts_Ef.shape[1]
    if axes.balance is not None and not axes.all_active:
        gate = {"unit": "unit", "normalised": "sigmoid", "softmax": "softmax"}[axes.gate]
        scores_TE = gate_scores(router_logits(scaled, sample.x_TD), gate)  # type: ignore[arg-type]
        bias_E = balanced_bias(scores_TE, bias_E, chosen, axes.balance)
    return Decision(
        partition.shared_n, partition.experts_Ef, weight_ED, bias_E, torch.tensor(chosen), up_ED,
        output_bias_D=sample.ffn.down_bias_D,
    )  # fmt: skip


def _logit_scale(sample: LayerSample, router: RouterInit, axes: Axes) -> float:
    if len(sample.x_TD) < 2:
        return 1.0
    std = router_logits(router, sample.x_TD).std().item()
    return LOGIT_STD[axes.gate] / std if std > 0 else 1.0


def _corrected(sample: LayerSample, decision: Decision, axes: Axes) -> Decision:
    """The decision with what makes up for the experts that were not chosen."""
    y_TD, ids_TK = routed_output(sample, decision, axes)
    bias_D = torch.zeros(y_TD.shape[1]) if decision.output_bias_D is None else decision.output_bias_D
    if axes.output == "refit":
        partition = Partition(decision.shared_n, decision.experts_Ef)
        down_DF, shift_D = refit_down(sample, masked_hidden(sample, partition, ids_TK))
        return decision._replace(output_bias_D=bias_D + shift_D, down_DF=down_DF)
    reference_TD = dense_output(sample)
    if axes.output == "bias":
        return decision._replace(output_bias_D=bias_D + residual_bias(reference_TD, y_TD))
    scale_D, shift_D = alignment(reference_TD, y_TD)
    return decision._replace(output_bias_D=scale_D * bias_D + shift_D, row_scale_D=scale_D)
