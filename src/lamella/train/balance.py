"""Once per optimizer step: sum the routing statistics over ranks and micro-batches, move the biases, keep a report.

Shapes: E experts, S pairs, N MoE layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from lamella.architecture.moe import DENSE_BIAS, AttentionMoEConfig, MoEConfig
from lamella.moe.balancing import max_violation, routing_entropy, sign_update
from lamella.moe.noise import noise_generator
from lamella.recipe.training import Recipe, TwinShare
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.routed import Aim, Routed


@dataclass(frozen=True)
class RoutingReport:
    """The routing of one optimizer step, per MoE layer; what concerns attention experts says so."""

    twin_share: list[float]
    """Share of the routed rows that trainable experts computed."""
    max_vio: list[float]
    """(max count - mean) / mean."""
    router_entropy: list[float]
    """Entropy of the load over log E: 1 is even."""
    attention_max_vio: list[float]
    """Of the layers of attention experts."""
    dead_experts: int
    """Experts, over all layers, those of attention too, that no token chose."""


def sum_reports(parts: list[RoutingReport]) -> RoutingReport:
    """One report of all stages of a pipeline, in their order."""
    return RoutingReport(
        twin_share=[x for part in parts for x in part.twin_share],
        max_vio=[x for part in parts for x in part.max_vio],
        router_entropy=[x for part in parts for x in part.router_entropy],
        attention_max_vio=[x for part in parts for x in part.attention_max_vio],
        dead_experts=sum(part.dead_experts for part in parts),
    )


class Balance:
    """Owner of the selection biases during training, and of what the routing is told besides.

    It is made before the first step; `aim` is called before every optimizer step and `update` after its backward
    passes, on every rank.
    """

    def __init__(
        self,
        model: LamellaDecoder,
        recipe: Recipe,
        mesh: DeviceMesh | None,
        tensor: DeviceMesh | None = None,
        stages: DeviceMesh | None = None,
    ):
        """Take charge of a model's layers.

        Args:
            mesh: the ranks whose batches differ; None on one rank.
            tensor: those of tensor parallelism, between which the tokens of a layer differ too.
            stages: those of a pipeline.
        """
        self.tensor, self.stages = tensor, stages
        self.layers, self.heads = model.moe_layers, model.routed_heads
        self.routed: list[Routed] = [*self.layers, *self.heads]
        self.recipe, self.mesh = recipe, mesh
        self.summed: list[Tensor] = []
        self.aim(1)

    def aim(self, step: int) -> None:
        """Before optimizer step `step`: its top-k, and the share that the update after it should reach in step + 1."""
        for layer in self.layers:
            layer.aim = self._twin_aim(step) if layer.moe.routing == "twin" else self._flat_aim(layer.moe, step)
        for heads in self.heads:
            share = self._even_share(heads.moe, heads.moe.num_experts_per_tok)
            heads.aim = Aim(next_share=self._on_device(share), auxiliary_factor=self._auxiliary_factor())

    def _twin_aim(self, step: int) -> Aim:
        share, loss = self.recipe.twin_share, self.recipe.routing_loss
        tokens_per_step = self.recipe.samples_per_step * self.recipe.seq_len
        return Aim(
            next_share=self._on_device(share.at(step + 1)) if isinstance(share, TwinShare) else None,
            choice_factor=0.0 if loss is None else loss.coefficient / tokens_per_step,
        )

    def _flat_aim(self, config: MoEConfig, step: int) -> Aim:
        return Aim(
            top_k=self._top_k(config, step),
            next_share=self._on_device(self._even_share(config, self._top_k(config, step + 1))),
            auxiliary_factor=self._auxiliary_factor(),
        )

    def _on_device(self, share: float | None) -> Tensor | None:
        if share is None:
            return None
        # filled there: nothing is copied from the host
        return torch.full((), share, dtype=torch.float64, device=self.routed[0].statistics.device)

    def _auxiliary_factor(self) -> float:
        """The factor on the loss of one forward: the gradients of a step's forwards, on all ranks, add up."""
        recipe = self.recipe
        if recipe.balancing != "aux":
            return 0.0
        ranks_per_layer = recipe.parallel.context * recipe.parallel.tensor
        part = recipe.samples_per_micro_batch / (recipe.samples_per_step * ranks_per_layer)
        return recipe.aux_coefficient * part

    def _even_share(self, config: MoEConfig | AttentionMoEConfig, top_k: int) -> float | None:
        """The share of the tokens of each expert, where biases aim at it."""
        return top_k / config.num_experts if self.recipe.balancing == "quantile" else None

    def _top_k(self, config: MoEConfig, step: int) -> int:
        schedule, own = self.recipe.top_k_schedule, config.num_experts_per_tok
        return own if schedule is None else schedule.at(step, own)

    def choice_targets(self, source_B: Tensor) -> Tensor | None:
        """What the samples of a micro-batch should choose in every pair, [B]; None without a routing loss.

        Args:
            source_B: the source of each sample, an index in the recipe's data.
        """
        if self.recipe.routing_loss is None:
            return None
        return torch.tensor(choice_targets(self.recipe), device=source_B.device)[source_B]

    @torch.no_grad()
    def update(self, move: bool = True) -> None:
        """Sum the statistics over ranks, move the biases, reset: after a step's backward passes, before the optimizer.

        Args:
            move: whether biases move; they do not where the step is skipped.
        """
        if not self.routed:
            return
        all_statistics = torch.cat([layer.statistics for layer in self.routed])
        for mesh in (self.mesh, self.tensor):
            if mesh is not None:
                torch.distributed.all_reduce(all_statistics, group=mesh.get_group())
        self.summed = list(all_statistics.split([len(layer.statistics) for layer in self.routed]))
        for layer, statistics in zip(self.routed, self.summed, strict=True):
            if move:
                self._move_bias(layer, statistics)
            layer.statistics.zero_()

    def _move_bias(self, layer: Routed, statistics: Tensor) -> None:
        E = layer.moe.num_experts
        bias = layer.router.selection_bias
        if layer.aim.next_share is not None:
            bias.copy_(statistics[E + 1 :] / statistics[E])
        elif layer.moe.routing == "flat" and self.recipe.balancing == "bias":
            bias.copy_(sign_update(bias, statistics[:E], self.recipe.bias_rate))

    def report(self) -> RoutingReport:
        """The routing of the latest step, of all layers; copies a few numbers per layer to the host."""
        own = self._own_report()
        if self.stages is None:
            return own
        parts = [own] * self.stages.size()
        torch.distributed.all_gather_object(parts, own, group=self.stages.get_group())
        return sum_reports(parts)

    def _own_report(self) -> RoutingReport:
        all_counts = [s[: layer.moe.num_experts].cpu() for layer, s in zip(self.routed, self.summed, strict=True)]
        counts, of_heads = all_counts[: len(self.layers)], all_counts[len(self.layers) :]
        frozen = [layer.moe.num_frozen_experts for layer in self.layers]
        return RoutingReport(
            twin_share=[float(c[S:].sum() / c.sum()) for c, S in zip(counts, frozen, strict=True)],
            max_vio=[float(max_violation(c)) for c in counts],
            router_entropy=[float(routing_entropy(c)) for c in counts],
            attention_max_vio=[float(max_violation(c)) for c in of_heads],
            dead_experts=sum(int((c == 0).sum()) for c in all_counts),
        )


def choice_targets(recipe: Recipe) -> list[float]:
    """What the samples of each source of the data should choose: 0 the frozen slices, 1 the twins, NaN either."""
    loss = recipe.routing_loss
    assert loss is not None
    names = [portion.source for portion in recipe.data]
    return [0.0 if name in loss.to_slices else 1.0 if name in loss.to_twins else math.nan for name in names]


@torch.no_grad()
def start_routing(model: LamellaDecoder, recipe: Recipe) -> bool:
    """Give a model that comes from conversion (all router rows zero) its routing; False leaves a trained router alone.

    Rows are drawn from a generator seeded by name, so they are the same on all ranks and on any number of them.
    """
    rows = [_full(layer.router.weight) for layer in model.moe_layers]
    if any(bool(r.any()) for r in rows):
        return False
    # counted over the whole model, of which a stage of a pipeline has a part
    with_experts = [str(i) for i, layer in enumerate(model.config.layers) if layer.moe_layer is not None]
    numbers = [with_experts.index(name) for name in model.layers if name in with_experts]
    for index, layer, row in zip(numbers, model.moe_layers, rows, strict=True):
        drawn = torch.empty(row.shape).normal_(
            std=recipe.router_init_std, generator=noise_generator(f"router.{index}", recipe.seed)
        )
        fill(layer.router.weight, drawn)
        held = layer.moe.routing == "twin" and isinstance(recipe.twin_share, TwinShare)
        layer.router.selection_bias.fill_(_first_bias(recipe) if held else 0.0)
    return True


def _first_bias(recipe: Recipe) -> float:
    """No margins are known before the first step: all slices, all twins, or the router's own choice."""
    assert isinstance(recipe.twin_share, TwinShare)
    share = recipe.twin_share.at(1)
    return DENSE_BIAS if share <= 0 else -DENSE_BIAS if share >= 1 else 0.0


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(target: Tensor, values: Tensor) -> None:
    """Copy values that every rank holds alike, in full, into a tensor that may be sharded."""
    values = values.to(target.device, target.dtype)
    if isinstance(target, DTensor):
        # no source rank: no communication
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def assert_loaded(model: LamellaDecoder) -> None:
    """Check that the checkpoint filled every weight: they start as NaN."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        assert not (local.is_floating_point() and bool(local.isnan().any())), f"{name} was not loaded, or is NaN"
