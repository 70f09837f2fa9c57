"""What layers of routed experts have in common in torchtitan, FFNs and attention: the router, and what training adds.

Parameters start as NaN: all come from a checkpoint.

Shapes: T tokens, D model width, E experts, R router rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtitan.protocols.module import Module

from lamella.architecture.moe import AttentionMoEConfig, Mode, MoEConfig
from lamella.moe.balancing import add_gradient_of, auxiliary_loss, expert_counts, quantile_bias, share_bias
from lamella.moe.routing import Routing, pair_margins


def unset(parameter: Tensor) -> None:
    """The only initialiser: what no checkpoint fills shows as NaN in the first loss."""
    nn.init.constant_(parameter, math.nan)


class Router(Module):
    """Router rows [R, D] and the float32 selection bias [R]."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        dim: int
        moe: MoEConfig | AttentionMoEConfig

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


class Routed(Module):
    """In training it gathers what balancing and reports need, until its statistics are reset."""

    def __init__(self, moe: MoEConfig | AttentionMoEConfig):
        super().__init__()
        self.moe: Any = moe
        self.mode: Mode = "routed"
        self.next_share: float | None = None
        """Share of the tokens that the twins (flat routing: each expert) should get after the next bias update; None
        gathers no bias for it."""
        self.auxiliary_factor = 0.0
        """On the auxiliary loss of one forward (flat routing); 0 computes none."""
        self.last_routing: Routing | None = None
        # counts [E], tokens, tokens * bias for next_share [R]: sums over forwards. Only ratios of them are used, so
        # a forward that activation checkpointing repeats changes nothing.
        self.statistics: Tensor
        width = moe.num_experts + 1 + moe.num_router_rows
        self.register_buffer("statistics", torch.empty(width, dtype=torch.float32), persistent=False)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        self.statistics = torch.zeros_like(self.statistics, device=buffer_device or self.statistics.device)

    def add_auxiliary_loss(self, y: Tensor, routing: Routing, scores_TE: Tensor) -> Tensor:
        """y, whose backward pass runs that of the loss, too."""
        if not self.auxiliary_factor:
            return y
        # gate "unit" has logits in the place of scores
        positive_TE = scores_TE.sigmoid() if self.moe.gate == "unit" else scores_TE
        return add_gradient_of(y, self.auxiliary_factor * auxiliary_loss(positive_TE, routing.expert_ids_TK))

    @torch.no_grad()
    def gather(self, routing: Routing, scores_TE: Tensor) -> None:
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
