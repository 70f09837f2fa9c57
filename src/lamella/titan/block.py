"""A block of the torchtitan home: torchtitan's attention, norms and rope, and a `MoELayer` in the FFN's place.

Shapes: B batch, L sequence, D model width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchtitan.models.common.decoder import TransformerBlock
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.rope import CosSinRoPE

from lamella.architecture.moe import Mode
from lamella.architecture.names import TITAN_LLAMA3
from lamella.titan.attention import ExpertAttention
from lamella.titan.masks import Masks, MasksByWindow, masks_of
from lamella.titan.moe import MoELayer


class ScaledRoPE(CosSinRoPE):
    """Torchtitan's rotary embedding in transformers' layout, with Llama 3.1's and linear frequency scaling too.

    Where `dim` is less than the width of a head, it turns the first features alone.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        """torchtitan's rope, and a linear scaling of positions."""

        linear_factor: float = 1.0
        rotates: bool = True
        """False: queries and keys stay as they are (SmolLM3 has such layers)."""

    def forward(self, query: Tensor, key: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries [B, L, N, H] and keys [B, L, G, H], turned by their positions."""
        if not self.config.rotates:
            return query, key
        rotated = [x[..., : self.config.dim] for x in (query, key)]
        q, k = super().forward(*rotated, positions)
        rest = [x[..., self.config.dim :] for x in (query, key)]
        if not rest[0].shape[-1]:
            return q, k
        return torch.cat([q, rest[0]], dim=-1), torch.cat([k, rest[1]], dim=-1)

    def _precompute_cache(self) -> Tensor:
        c = self.config
        frequencies = 1.0 / (c.theta ** (torch.arange(0, c.dim, 2).float() / c.dim)) / c.linear_factor
        if c.scaling == TITAN_LLAMA3:
            frequencies = llama3_frequencies(
                frequencies, c.scaling_factor, c.low_freq_factor, c.high_freq_factor, c.original_max_position_embeddings
            )
        angles = torch.outer(torch.arange(c.max_seq_len).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def llama3_frequencies(frequencies: Tensor, factor: float, low: float, high: float, original_length: int) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, between them interpolated."""
    wavelengths = 2 * math.pi / frequencies
    kept = ((original_length / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


class BlockContext(NamedTuple):
    """What every block is told about a forward pass besides hidden states and positions."""

    masks: Masks | MasksByWindow
    mode: Mode = "routed"
    choice_targets_B: Tensor | None = None


class Block(TransformerBlock):
    """Attention, then the MoE or, in layers that stay dense, torchtitan's feed-forward."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        """torchtitan's block, and the MoE layer where it has one."""

        # not `moe`, which torchtitan expects to be its own MoE
        moe_layer: MoELayer.Config | None = None
        post_ffn_norm: RMSNorm.Config | None = None
        """Of blocks with norms behind attention and FFN: `ffn_norm` is then the attention's, after transformers' name,
        and `attention_norm` does nothing."""
        residual_scale: float = 1.0
        """Factor on what attention and FFN add."""
        window: int | None = None
        """Tokens that a token sees, itself among them."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention = config.attention.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()
        self.post_ffn_norm = None if config.post_ffn_norm is None else config.post_ffn_norm.build()
        self.residual_scale, self.window = config.residual_scale, config.window
        self.moe_enabled = config.moe_layer is not None
        if config.moe_layer is not None:
            self.moe = config.moe_layer.build()
        else:
            assert config.feed_forward is not None
            self.feed_forward = config.feed_forward.build()

    def forward(self, x_BLD: Tensor, context: BlockContext, positions: Tensor | None = None) -> Tensor:
        """The hidden states [B, L, D] behind this block."""
        attended_BLD, masks = self.attention_norm(x_BLD), masks_of(context.masks, self.window)
        if isinstance(self.attention, ExpertAttention):
            attended_BLD = self.attention(attended_BLD, masks, positions, context.mode)
        else:
            attended_BLD = self.attention(attended_BLD, masks, positions)
        if self.post_ffn_norm is not None:
            x_BLD = x_BLD + self._scaled(self.ffn_norm(attended_BLD))
            return x_BLD + self._scaled(self.post_ffn_norm(self._ffn(x_BLD, context)))
        x_BLD = x_BLD + self._scaled(attended_BLD)
        return x_BLD + self._scaled(self._ffn(self.ffn_norm(x_BLD), context))

    def _ffn(self, x_BLD: Tensor, context: BlockContext) -> Tensor:
        if not self.moe_enabled:
            return self.feed_forward(x_BLD)
        return self.moe(x_BLD, context.mode, context.choice_targets_B)

    def _scaled(self, added_BLD: Tensor) -> Tensor:
        return added_BLD if self.residual_scale == 1.0 else added_BLD * self.residual_scale
