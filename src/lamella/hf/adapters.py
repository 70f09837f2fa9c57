"""The transformers home of adapters as experts: a module around a decoder layer's dense FFN, whose parameters it keeps.

The maths is in `lamella.moe.adapters`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.architecture.adapters import FFN_MODULES, SELECTION_BIAS, ZERO_BIAS, AdaptersConfig, adapter_shapes
from lamella.errors import UserError
from lamella.hf.blocks import decoder_layers
from lamella.hf.computing import Computing
from lamella.moe.adapters import (
    AdapterFFNWeights,
    LowRank,
    all_experts,
    own_tokens,
    route_adapters,
    straight_through,
)
from lamella.moe.routing import Routing, router_logits


class GatedFFN(Protocol):
    """What is read of the dense module."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class Adapters(nn.Module):
    """Parameters only: the low-rank matrices of all adapters of a layer, [N, ...]."""

    def __init__(self, D: int, F: int, config: AdaptersConfig):
        super().__init__()
        for name, shape in adapter_shapes(D, F, config).items():
            if name.startswith("adapters."):
                self.register_parameter(name.removeprefix("adapters."), nn.Parameter(torch.zeros(shape)))

    def low_rank(self, module: str) -> LowRank:
        """The matrices of a module such as "gate_proj"."""
        return LowRank(getattr(self, f"{module}_a"), getattr(self, f"{module}_b"))


class AdapterRouter(nn.Module):
    """Router rows [E, D] and the float32 selection bias [E], which at first sends all tokens to the zero expert."""

    def __init__(self, D: int, config: AdaptersConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, D))
        self.selection_bias: Tensor
        self.register_buffer(SELECTION_BIAS.rpartition(".")[2], torch.zeros(config.num_experts))
        self.to_zero_expert()

    @torch.no_grad()
    def to_zero_expert(self) -> None:
        """Zero rows, and a bias towards the zero expert: the dense model."""
        self.weight.zero_()
        self.selection_bias.zero_()
        self.selection_bias[-1] = ZERO_BIAS


class AdapterFFN(nn.Module):
    """Takes the place of a decoder layer's gated FFN, and holds its projections. It maps [..., D] to [..., D]."""

    def __init__(self, dense: GatedFFN, config: AdaptersConfig, computing: Computing):
        super().__init__()
        self.config, self.computing = config, computing
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj
        F, D = self.gate_proj.weight.shape
        self.adapters, self.router = Adapters(D, F, config), AdapterRouter(D, config)
        self.last_routing: Routing | None = None
        """The routing of the latest forward, without its graph, for reports."""
        self.last_logits_TE: Tensor | None = None
        """The router's logits of the latest forward that trains it, with their graph."""

    @property
    def weights(self) -> AdapterFFNWeights:
        """What the layer computes with."""
        low = (self.adapters.low_rank(module) for module in FFN_MODULES)
        return AdapterFFNWeights(self.gate_proj, self.up_proj, self.down_proj, *low)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The output: of the experts that the router chooses, or of the one that `computing.adapter` names."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.computing.adapter is not None:
            shape = (len(x_TD), 1)
            ids_TK = torch.full(shape, self.computing.adapter, dtype=torch.int64, device=x_TD.device)
            routing = Routing(ids_TK, torch.ones(shape, device=x_TD.device))
            y_TD = own_tokens(x_TD, self.weights, routing)
        else:
            logits_TE = router_logits(x_TD, self.router.weight)
            probs_TE = logits_TE.softmax(-1)
            routing = route_adapters(probs_TE, self.router.selection_bias, self.config.num_experts_per_tok)
            if torch.is_grad_enabled() and self.router.weight.requires_grad:
                self.last_logits_TE = logits_TE
                y_TD = all_experts(x_TD, self.weights, straight_through(probs_TE, routing))
            else:
                y_TD = own_tokens(x_TD, self.weights, routing)
        self.last_routing = routing.detached()
        return y_TD.view_as(hidden_states)


def install_adapters(model: PreTrainedModel, config: AdaptersConfig, computing: Computing) -> None:
    """Put an `AdapterFFN` around the FFN of each layer that the config names; UserError where there is none such."""
    layers = decoder_layers(model)
    if outside := [index for index in config.layers if not 0 <= index < len(layers)]:
        raise UserError(f"adapters are in the layers {outside}, but the model has the layers 0-{len(layers) - 1}")
    for index in config.layers:
        layer: Any = layers[index]
        layer.mlp = AdapterFFN(layer.mlp, config, computing)


def adapter_layers(model: PreTrainedModel) -> list[AdapterFFN]:
    """The layers of a model whose FFNs have adapters."""
    return [module for module in model.modules() if isinstance(module, AdapterFFN)]
