"""The MoE layer in torchtitan: modules that hold its weights, and what training adds to its forward pass.

The maths of the experts is in `lamella.moe.experts.moe_ffn`. Parameters start as NaN: all come from a checkpoint.

Shapes: B batch, L sequence, T = B*L tokens, D model width, S slices, E experts, R router rows, f neurons per expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lamella.models.titan_device  # noqa: F401  first: torchtitan asks for the device while it is imported

# isort: split
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torchtitan.protocols.module import Module

from lamella.config import ExpertPath, Mode, MoEConfig
from lamella.moe.balancing import (
    add_gradient_of,
    auxiliary_loss,
    expert_counts,
    pair_choice_loss,
    quantile_bias,
    share_bias,
)
from lamella.moe.experts import MoEWeights, SharedExpert, moe_ffn, packed, packed_lora, router_scores
from lamella.moe.lora import Lora
from lamella.moe.routing import Routing, pair_margins
from lamella.moe.slicing import Experts


def unset(parameter: Tensor) -> None:
    """The only initialiser: what no checkpoint fills shows as NaN in the first loss."""
    nn.init.constant_(parameter, math.nan)


EXPERT_NAMES = ("frozen_gate_up_proj", "frozen_down_proj", "trainable_gate_up_proj", "trainable_down_proj")
LORA_NAMES = tuple(f"lora_{name}" for name in Lora._fields)
OTHER_NAMES = ("weight", "bias", "up_weight", "gate_scale", "gate_up_proj", "down_proj", "output_bias")
UNSET = dict.fromkeys((*EXPERT_NAMES, *LORA_NAMES, *OTHER_NAMES), unset)


class PackedExperts(Module):
    """Parameters only: frozen and trainable experts apart, so that an optimizer never sees the frozen ones."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        moe: MoEConfig

    def __init__(self, config: Config):
        super().__init__()
        D, f = config.dim, config.moe.moe_intermediate_size
        counts = {"frozen": config.moe.num_frozen_experts, "trainable": config.moe.num_trainable_experts}
        for kind, E in counts.items():
            if E:
                self.register_parameter(f"{kind}_gate_up_proj", nn.Parameter(torch.empty(E, 2 * f, D)))
                self.register_parameter(f"{kind}_down_proj", nn.Parameter(torch.empty(E, D, f)))
        for name, shape in config.moe.lora_shapes(D).items():
            self.register_parameter(f"lora_{name}", nn.Parameter(torch.empty(shape)))
        # torchtitan's FSDP shards another dimension over more ranks than this
        self.num_experts = min(E for E in counts.values() if E)

    @property
    def frozen(self) -> Experts:
        return _here(packed(self, "frozen"))

    @property
    def trainable(self) -> Experts:
        return _here(packed(self, "trainable"))


def _here(experts: Experts) -> Experts:
    """This rank's experts, where expert parallelism shares them out."""
    return Experts(*(t.to_local() if isinstance(t, DTensor) else t for t in experts))


def _plain(tensor: Any) -> Any:
    """A weight that ranks of tensor parallelism hold whole, each for tokens of its own: gradients add up."""
    return tensor.to_local(grad_placements=[Partial()]) if isinstance(tensor, DTensor) else tensor


class Shared(Module):
    """Parameters only: the expert that is always on, of `width` neurons."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        width: int

    def __init__(self, config: Config):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * config.width, config.dim))
        self.down_proj = nn.Parameter(torch.empty(config.dim, config.width))


class Router(Module):
    """Router rows [R, D] and the float32 selection bias [R]."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        moe: MoEConfig

    def __init__(self, config: Config):
        super().__init__()
        R, moe = config.moe.num_router_rows, config.moe
        self.weight = nn.Parameter(torch.empty(R, config.dim))
        self.up_weight = nn.Parameter(torch.empty(R, config.dim)) if moe.router == "analytic" else None
        self.gate_scale = nn.Parameter(torch.empty(R)) if moe.gate == "unit" else None
        self.selection_bias: Tensor
        self.register_buffer("selection_bias", torch.empty(R, dtype=torch.float32))

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        device = buffer_device or self.selection_bias.device
        self.selection_bias = torch.full_like(self.selection_bias, math.nan, device=device)


class SlicedMoE(Module):
    """[B, L, D] -> [B, L, D]; in training it also gathers what balancing and reports need, until `reset_statistics`."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        moe: MoEConfig
        expert_path: ExpertPath = "auto"

    def __init__(self, config: Config):
        super().__init__()
        self.moe = config.moe
        self.path: ExpertPath = config.expert_path
        self.expert_group: torch.distributed.ProcessGroup | None = None
        """The ranks that share out the experts; None: this one holds all."""
        self.mode: Mode = "routed"
        dim, moe, width = config.dim, config.moe, config.moe.shared_intermediate_size
        self.experts = PackedExperts.Config(dim=dim, moe=moe, param_init=UNSET).build()
        self.router = Router.Config(dim=dim, moe=moe, param_init=UNSET).build()
        self.shared = Shared.Config(dim=dim, width=width, param_init=UNSET).build() if width else None
        self.output_bias = nn.Parameter(torch.empty(dim)) if moe.output_bias else None
        self.next_share: float | None = None
        """Share of the tokens that the twins (flat routing: each expert) should get after the next bias update; None
        gathers no bias for it."""
        self.auxiliary_factor = 0.0
        """On the auxiliary loss of one forward (flat routing); 0 computes none."""
        self.choice_targets_B: Tensor | None = None
        """What each sample's tokens should choose in every pair; see `pair_choice_loss`."""
        self.choice_factor = 0.0
        """On that loss of one token."""
        self.observer: Callable[[Tensor], None] | None = None
        """Is shown what the layer gets, [T, D]."""
        self.last_routing: Routing | None = None
        # counts [E], tokens, tokens * bias for next_share [R]: sums over forwards. Only ratios of them are used, so
        # a forward that activation checkpointing repeats changes nothing.
        self.statistics: Tensor
        width = config.moe.num_experts + 1 + config.moe.num_router_rows
        self.register_buffer("statistics", torch.empty(width, dtype=torch.float32), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.statistics = torch.zeros_like(self.statistics, device=buffer_device or self.statistics.device)

    @property
    def routed_experts(self) -> Any:
        """Where torchtitan's FSDP looks for packed expert parameters."""
        return SimpleNamespace(inner_experts=self.experts)

    @property
    def weights(self) -> MoEWeights:
        router, experts, shared = self.router, self.experts, self.shared
        return MoEWeights(
            _plain(router.weight), router.selection_bias, experts.frozen, experts.trainable, _plain(router.up_weight),
            _plain(router.gate_scale),
            None if shared is None else SharedExpert(_plain(shared.gate_up_proj), _plain(shared.down_proj)),
            _plain(self.output_bias), packed_lora(experts),
        )  # fmt: skip

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD, weights = x_BLD.flatten(0, 1), self.weights
        if self.observer is not None:
            self.observer(x_TD)
        y_TD, self.last_routing, scores_TE = moe_ffn(x_TD, weights, self.moe, self.mode, self.path, self.expert_group)
        if self.training and scores_TE is not None:
            self._gather(self.last_routing, scores_TE)
            y_TD = self._add_auxiliary_loss(y_TD, self.last_routing, scores_TE)
            y_TD = self._add_choice_loss(y_TD, x_TD, weights)
        return y_TD.view_as(x_BLD)

    def _add_auxiliary_loss(self, y_TD: Tensor, routing: Routing, scores_TE: Tensor) -> Tensor:
        if not self.auxiliary_factor:
            return y_TD
        # gate "unit" has logits in the place of scores
        positive_TE = scores_TE.sigmoid() if self.moe.gate == "unit" else scores_TE
        return add_gradient_of(y_TD, self.auxiliary_factor * auxiliary_loss(positive_TE, routing.expert_ids_TK))

    def _add_choice_loss(self, y_TD: Tensor, x_TD: Tensor, weights: MoEWeights) -> Tensor:
        """Its gradient ends at the router: the layers below are not to learn how to be told apart."""
        if self.choice_targets_B is None:
            return y_TD
        targets_T = self.choice_targets_B.repeat_interleave(len(y_TD) // len(self.choice_targets_B))
        scores_TE = router_scores(x_TD.detach(), weights, self.moe)
        return add_gradient_of(y_TD, self.choice_factor * pair_choice_loss(scores_TE, targets_T))

    @torch.no_grad()
    def _gather(self, routing: Routing, scores_TE: Tensor) -> None:
        num_tokens, E = scores_TE.shape
        self.statistics[:E] += expert_counts(routing.expert_ids_TK, E)
        self.statistics[E] += num_tokens
        if self.next_share is not None:
            twin = self.moe.routing == "twin"
            bias_R = (
                share_bias(pair_margins(scores_TE), self.next_share)
                if twin
                else quantile_bias(scores_TE, self.next_share)
            )
            self.statistics[E + 1 :] += num_tokens * bias_R
