"""The transformers home of attention experts: a module in the place of a decoder layer's `self_attn`.

The dense projections (and norms) stay as they are, under their own names; a router is added. The maths is in
`lamella.moe.attention.heads`. Masks are transformers' own, so padding, packed documents and windows mean what they
mean in a dense layer; padding is not routed at all.
"""

from __future__ import annotations

from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from lamella.architecture.moe import AttentionMoEConfig
from lamella.architecture.moe_tensors import SELECTION_BIAS
from lamella.architecture.sizes import check_experts
from lamella.errors import UserError
from lamella.hf.cache import ragged_layer
from lamella.hf.computing import Computing
from lamella.moe.attention.heads import (
    AttentionWeights,
    Context,
    Projection,
    attend_masked,
    attention_scores,
    fixed_attention_routing,
    route_attention,
)
from lamella.moe.attention.routed import attend_routed
from lamella.moe.routing import Routing


class AttentionRouter(nn.Module):
    """Router rows [E, D] and the float32 selection bias [E]; the gate "unit" has a scale [E], too."""

    def __init__(self, hidden_size: int, config: AttentionMoEConfig):
        super().__init__()
        E = config.num_experts
        self.weight = nn.Parameter(torch.zeros(E, hidden_size))
        self.gate_scale = nn.Parameter(torch.zeros(E)) if config.gate == "unit" else None
        self.selection_bias: Tensor
        self.register_buffer(SELECTION_BIAS, torch.zeros(E, dtype=torch.float32))

    @torch.no_grad()
    def zero(self) -> None:
        """Every expert ties with every other."""
        for tensor in (*self.parameters(), self.selection_bias):
            tensor.zero_()


class DenseAttention(Protocol):
    """What attention experts read of the module they replace; `q_norm`, `k_norm`, `sliding_window` are optional."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    layer_idx: int
    head_dim: int
    attention_dropout: float
    config: PreTrainedConfig


class AttentionExperts(nn.Module):
    """Takes the place of a dense attention module, whose parameters it takes over."""

    def __init__(
        self, dense: DenseAttention, hidden_size: int, config: AttentionMoEConfig, computing: Computing | None = None
    ):
        super().__init__()
        self.computing = computing or Computing()
        self.config, self.layer_idx = config, dense.layer_idx
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = dense.q_proj, dense.k_proj, dense.v_proj, dense.o_proj
        self.q_norm, self.k_norm = getattr(dense, "q_norm", None), getattr(dense, "k_norm", None)
        self.router = AttentionRouter(hidden_size, config)
        self.head_dim, self.dropout = dense.head_dim, dense.attention_dropout
        # Mistral has the window in its config alone.
        self.window = getattr(dense, "sliding_window", getattr(dense.config, "sliding_window", None))
        self.model_config: PreTrainedConfig = dense.config
        self.last_routing: Routing | None = None
        """The routing of the latest forward, padding included, without its graph, for reports."""

    @property
    def weights(self) -> AttentionWeights:
        """The dense layer's projections and norms, as the maths wants them."""
        q, k, v, o = (Projection(p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj, self.o_proj))
        return AttentionWeights(q, k, v, o, self.head_dim, self.config.num_experts, self.q_norm, self.k_norm)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """The attention's output [B, L, D] and None: no attention weights are given back."""
        self._check_mask(attention_mask)
        B, L, _D = hidden_states.shape
        mask_BLS = None if attention_mask is None else _as_bool(attention_mask).expand(B, -1, -1)
        cos_BLH, sin_BLH = (table.expand(B, -1, -1) for table in position_embeddings)
        context = Context(cos_BLH, sin_BLH, mask_BLS, self.window)
        routing = self._route(hidden_states.flatten(0, 1))
        self.last_routing = routing.detached()
        if self.computing.attention_path == "masked":
            if past_key_values is not None:
                raise UserError("the path 'masked' keeps no keys; pass use_cache=False")
            return attend_masked(hidden_states, self.weights, routing, context), None
        remember = None
        if past_key_values is not None:
            layer = ragged_layer(past_key_values, self.layer_idx, self.window)
            context = context._replace(seen=layer.seen)
            remember = partial(layer.remember, num_sequences=B, num_tokens=L)
        dropout = self.dropout if self.training else 0.0
        return attend_routed(hidden_states, self.weights, routing, context, remember, dropout), None

    def _route(self, x_TD: Tensor) -> Routing:
        if self.computing.mode != "routed":
            return fixed_attention_routing(len(x_TD), self.computing.mode, self.config, x_TD.device)
        router = self.router
        scores_TE = attention_scores(x_TD, router.weight, self.config)
        return route_attention(scores_TE, router.selection_bias, self.config, router.gate_scale)

    def _check_mask(self, mask: Tensor | None) -> None:
        implementation = self.model_config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise UserError(
                f"attention experts read no masks of {implementation!r}; load with attn_implementation='sdpa'"
            )
        if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1):
            raise UserError(
                f"attention experts take a mask [batch, tokens], or [batch, 1, tokens, tokens], not {list(mask.shape)}"
            )


def _as_bool(mask_B1LS: Tensor) -> Tensor:
    """[B, L, S]: transformers' masks are true where a token may be seen, or 0 there and very negative elsewhere."""
    mask_BLS = mask_B1LS[:, 0]
    return mask_BLS if mask_BLS.dtype == torch.bool else mask_BLS == 0


def install_attention_experts(model: PreTrainedModel, config: AttentionMoEConfig, computing: Computing) -> None:
    """Replace `self_attn` in the layers that the config names; UserError where the model has none such."""
    layers = model.model.layers
    if outside := [index for index in config.layers if not 0 <= index < len(layers)]:
        raise UserError(f"attention_moe names the layers {outside}, but the model has the layers 0-{len(layers) - 1}")
    sizes = model.config
    check_experts(config.num_experts, sizes.num_attention_heads, sizes.num_key_value_heads)
    for index in config.layers:
        layers[index].self_attn = AttentionExperts(layers[index].self_attn, sizes.hidden_size, config, computing)
