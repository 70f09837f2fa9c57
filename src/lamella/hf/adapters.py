"""The transformers home of adapters as experts: a module around a decoder layer's dense FFN, whose
parameters it keeps, and one beside its attention, whose projections it takes the place of.

The maths is in `lamella.moe.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lamella.architecture.adapters import MODULES, SELECTION_BIAS, ZERO_BIAS, AdaptersConfig, Widths, adapter_shapes
from lamella.errors import UserError
from lamella.hf.blocks import decoder_layers
from lamella.hf.computing import Computing
from lamella.moe.adapters import (
    AdapterFFNWeights,
    LowRank,
    all_experts,
    all_low_rank,
    one_expert,
    one_low_rank,
    own_low_rank,
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

    def __init__(self, widths: Widths, config: AdaptersConfig):
        super().__init__()
        for name, shape in adapter_shapes(widths, config).items():
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


class AdapterBlock(nn.Module):
    """What a block with adapters holds beside its dense weights: the adapters, and the router that chooses."""

    def __init__(self, widths: Widths, config: AdaptersConfig, computing: Computing):
        super().__init__()
        self.config, self.computing = config, computing
        self.adapters, self.router = Adapters(widths, config), AdapterRouter(next(iter(widths.values()))[0], config)
        self.last_routing: Routing | None = None
        """The routing of the latest forward, without its graph, for reports."""
        self.last_logits_TE: Tensor | None = None
        """The router's logits of the latest forward that trains it, with their graph."""
        self.watch: Callable[[Tensor], None] | None = None
        """Is shown what the router is given, whoever chooses."""

    def choose(self, x_TD: Tensor) -> int | Routing | Tensor:
        """The expert that `computing.adapter` names, or what the router chooses; where it trains, weights [T, E]."""
        if self.watch is not None:
            self.watch(x_TD)
        index = self.computing.adapter
        if index is not None:
            ids_TK = torch.full((len(x_TD), 1), index, dtype=torch.int64, device=x_TD.device)
            self.last_routing = Routing(ids_TK, torch.ones(ids_TK.shape, device=x_TD.device))
            return index
        logits_TE = router_logits(x_TD, self.router.weight)
        probs_TE = logits_TE.softmax(-1)
        routing = route_adapters(probs_TE, self.router.selection_bias, self.config.num_experts_per_tok)
        self.last_routing = routing.detached()
        if torch.is_grad_enabled() and self.router.weight.requires_grad:
            self.last_logits_TE = logits_TE
            return straight_through(probs_TE, routing)
        return routing


class AdapterFFN(AdapterBlock):
    """Takes the place of a decoder layer's gated FFN, and holds its projections. It maps [..., D] to [..., D]."""

    def __init__(self, dense: GatedFFN, config: AdaptersConfig, computing: Computing):
        super().__init__(_widths(dense, MODULES["mlp"]), config, computing)
        self.gate_proj, self.up_proj, self.down_proj = dense.gate_proj, dense.up_proj, dense.down_proj

    @property
    def weights(self) -> AdapterFFNWeights:
        """What the layer computes with."""
        low = (self.adapters.low_rank(module) for module in MODULES["mlp"])
        return AdapterFFNWeights(self.gate_proj, self.up_proj, self.down_proj, *low)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The output: of the experts that the router chooses, or of the one that `computing.adapter` names."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen = self.choose(x_TD)
        if isinstance(chosen, int):
            y_TD = one_expert(x_TD, self.weights, chosen)
        elif isinstance(chosen, Tensor):
            y_TD = all_experts(x_TD, self.weights, chosen)
        else:
            y_TD = own_tokens(x_TD, self.weights, chosen)
        return y_TD.view_as(hidden_states)


class AttentionAdapters(AdapterBlock):
    """Beside a decoder layer's attention, whose input routes each token; its projections ask for what to add.

    A token's query, key, value and output are those of the experts that the token itself chose, so a cache of keys and
    values holds what the token had when it was computed.
    """

    def __init__(self, attention: nn.Module, config: AdaptersConfig, computing: Computing):
        super().__init__(_widths(attention, MODULES["attention"]), config, computing)
        self.chosen: int | Routing | Tensor | None = None
        for module in MODULES["attention"]:
            setattr(attention, module, AdapterLinear(getattr(attention, module), self, module))
        attention.register_forward_pre_hook(self._route, with_kwargs=True)

    def _route(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.chosen = self.choose(hidden_states.reshape(-1, hidden_states.shape[-1]))

    def added(self, x_TD: Tensor, module: str) -> Tensor:
        """What the adapters add to the output of a projection for its input [T, in]."""
        low = self.adapters.low_rank(module)
        if isinstance(self.chosen, int):
            return one_low_rank(x_TD, low, self.chosen)
        if isinstance(self.chosen, Tensor):
            return all_low_rank(x_TD, low, self.chosen)
        assert self.chosen is not None
        return own_low_rank(x_TD, low, self.chosen)


class AdapterLinear(nn.Module):
    """A projection of attention, under its own name, and what the adapters add to it."""

    def __init__(self, dense: nn.Linear, beside: AttentionAdapters, module: str):
        super().__init__()
        self.weight, self.bias, self.module = dense.weight, dense.bias, module
        self.in_features, self.out_features = dense.in_features, dense.out_features
        object.__setattr__(self, "beside", beside)  # its parameters are the attention's, named once

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y, beside = nn.functional.linear(x, self.weight, self.bias), cast("AttentionAdapters", vars(self)["beside"])
        return y + beside.added(x.reshape(-1, x.shape[-1]), self.module).expand(y.numel() // y.shape[-1], -1).view_as(y)


def _widths(block: Any, modules: tuple[str, ...]) -> Widths:
    return {name: (getattr(block, name).in_features, getattr(block, name).out_features) for name in modules}


def install_adapters(model: PreTrainedModel, config: AdaptersConfig, computing: Computing) -> None:
    """Put adapters around the blocks of each layer that the config names; UserError where there is none such."""
    layers = decoder_layers(model)
    if outside := [index for index in config.layers if not 0 <= index < len(layers)]:
        raise UserError(f"adapters are in the layers {outside}, but the model has the layers 0-{len(layers) - 1}")
    for index in config.layers:
        layer: Any = layers[index]
        if "mlp" in config.blocks:
            layer.mlp = AdapterFFN(layer.mlp, config, computing)
        if "attention" in config.blocks:
            layer.self_attn.lora = AttentionAdapters(layer.self_attn, config, computing)


def adapter_blocks(model: PreTrainedModel) -> list[AdapterBlock]:
    """The blocks of a model that have adapters, FFNs and attention."""
    return [module for module in model.modules() if isinstance(module, AdapterBlock)]


def adapter_layers(model: PreTrainedModel) -> list[AdapterFFN]:
    """The layers of a model whose FFNs have adapters."""
    return [module for module in model.modules() if isinstance(module, AdapterFFN)]
