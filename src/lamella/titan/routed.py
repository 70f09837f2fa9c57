"""What layers of routed experts have in common in torchtitan, FFNs and attention: the router, and what training adds.

Parameters start as NaN: all come from a checkpoint.

Shapes: T tokens, D model width, E experts, R router rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchtitan.protocols.module import Module

from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.architecture.moe_tensors import SELECTION_BIAS
from lamella.moe.balancing import add_gradient_of, auxiliary_loss, expert_counts, quantile_bias, share_bias
from lamella.moe.routing import Routing, pair_margins


def unset(parameter: Tensor) -> None:
    """The only initialiser: what no checkpoint fills shows as NaN in the first loss."""
    nn.init.constant_(parameter, math.nan)


class Router(Module):
    """Router rows [R, D] and the float32 selection bias [R]."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """The model width and the layer's MoE config."""

        dim: int
        moe: MoEConfig | AttentionMoEConfig

    def __init__(self, config: Config):
        super().__init__()
        R, moe = config.moe.num_router_rows, config.moe
        self.weight = nn.Parameter(torch.empty(R, config.dim))
        self.up_weight = nn.Parameter(torch.empty(R, config.dim)) if moe.router == "analytic" else None
        self.gate_scale = nn.Parameter(torch.empty(R)) if moe.gate == "unit" else None
        self.selection_bias: Tensor
        self.register_buffer(SELECTION_BIAS, torch.empty(R, dtype=torch.float32))

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        device = buffer_device or self.selection_bias.device
        self.selection_bias = torch.full_like(self.selection_bias, math.nan, device=device)


@dataclass(frozen=True)
class Aim:
    """What training wants of a layer's routing, until it says otherwise."""

    top_k: int | None = None
    """Experts per token (flat routing); None: the config's."""
    next_share: Tensor | None = None
    """The share of the tokens, 0 to 1, that the twins (flat routing: each expert) should get after the next bias
    update, a float64 scalar on the layer's device: a number would be part of a compiled graph. None: no bias is
    gathered for it."""
    auxiliary_factor: float = 0.0
    """The factor on the auxiliary loss of one forward (flat routing); 0: none is computed."""
    choice_factor: float = 0.0
    """The factor on one token's `pair_choice_loss` (twin routing)."""


class Routed(Module):
    """A layer of routed experts. In training it gathers what balancing and reports need, until that is reset."""

    def __init__(self, moe: MoEConfig | AttentionMoEConfig):
        super().__init__()
        self.moe = moe
        self.aim = Aim()
        self.last_routing: Routing | None = None
        """The routing of the latest forward, without its graph."""
        # counts [E], tokens, tokens * bias for next_share [R]: sums over forwards. Only ratios of them are used, so
        # a forward that activation checkpointing repeats changes nothing.
        self.statistics: Tensor
        width = moe.num_experts + 1 + moe.num_router_rows
        self.register_buffer("statistics", torch.empty(width, dtype=torch.float32), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.statistics = torch.zeros_like(self.statistics, device=buffer_device or self.statistics.device)

    def add_auxiliary_loss(self, y: Tensor, routing: Routing, scores_TE: Tensor) -> Tensor:
        """The tensor y unchanged; its backward pass also runs that of the loss."""
        if not self.aim.auxiliary_factor:
            return y
        # gate "unit" has logits in the place of scores
        positive_TE = scores_TE.sigmoid() if self.moe.gate == "unit" else scores_TE
        return add_gradient_of(y, self.aim.auxiliary_factor * auxiliary_loss(positive_TE, routing.expert_ids_TK))

    @torch.no_grad()
    def gather(self, routing: Routing, scores_TE: Tensor) -> None:
        """Add a forward's counts to the statistics and, where the aim is a share, the biases that reach it."""
        num_tokens, E = scores_TE.shape
        share = self.aim.next_share
        self.statistics[:E] += expert_counts(routing.expert_ids_TK, E)
        self.statistics[E] += num_tokens
        if share is not None:
            twin = self.moe.routing == "twin"
            bias_R = share_bias(pair_margins(scores_TE), share) if twin else quantile_bias(scores_TE, share)
            self.statistics[E + 1 :] += num_tokens * bias_R
