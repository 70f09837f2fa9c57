"""What decoders of Llama's kin have and torchtitan's lacks: factors, norms of other places and widths, joined matrices.

Each is torchtitan's own module with one thing changed, so that weights keep their names, and whatever handles a
decoder (FSDP, the loss in chunks, checkpoints) handles these.

Shapes: B batch, L sequence, D model width, N query heads, G key/value heads, H head width, F FFN width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.models.common.attention import BaseQKVLinear, GQAttention
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.protocols.module import Module

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS


class ScaledEmbedding(Embedding):
    """Embeddings times a number."""

    @dataclass(kw_only=True, slots=True)
    class Config(Embedding.Config):
        """torchtitan's, and the number."""

        scale: float
        rounds: bool = False
        """The number is rounded to the dtype of the embeddings first, as in Gemma."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.scale, self.rounds = config.scale, config.rounds

    def forward(self, input: Tensor) -> Tensor:
        """[B, L] -> [B, L, D]"""
        x_BLD = super().forward(input)
        return x_BLD * (torch.tensor(self.scale, dtype=x_BLD.dtype) if self.rounds else self.scale)


class ScaledLinear(Linear):
    """A projection times a number: the output head."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        """torchtitan's, and the number."""

        scale: float

    def __init__(self, config: Config):
        super().__init__(config)
        self.scale = config.scale

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return super().forward(input) * self.scale


class OffsetNorm(RMSNorm):
    """A root mean square norm whose weights are stored as their distance from a number (Gemma: 1)."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        """torchtitan's, and the number."""

        offset: float

    def __init__(self, config: Config):
        super().__init__(config)
        self.offset = config.offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return F.rms_norm(x, self.normalized_shape, self.weight + self.offset, self.eps)


class AllHeadsNorm(RMSNorm):
    """One norm over all heads of a token together (OLMo 2), where torchtitan norms each head."""

    @dataclass(kw_only=True, slots=True)
    class Config(RMSNorm.Config):
        """torchtitan's; the shape is that of all heads."""

    def forward(self, x_BLNH: Tensor) -> Tensor:
        """[B, L, N, H] -> [B, L, N, H]"""
        return super().forward(x_BLNH.flatten(2)).view_as(x_BLNH)


class KinAttention(GQAttention):
    """torchtitan's attention with a scale of its own, and norms over all heads."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        """torchtitan's, the factor on the scores, and the norms of all query heads and of all key heads."""

        scale: float
        q_norm: AllHeadsNorm.Config | None = None
        k_norm: AllHeadsNorm.Config | None = None

    def __init__(self, config: Config):
        super().__init__(config)
        self.scaling = config.scale
        if config.q_norm is not None and config.k_norm is not None:
            self.q_norm, self.k_norm = config.q_norm.build(), config.k_norm.build()


class JoinedQKVLinear(BaseQKVLinear):
    """One matrix of the query heads' rows, then the key heads', then the value heads' (Phi-3)."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseQKVLinear.Config):
        """The heads, and the matrix."""

        n_heads: int
        n_kv_heads: int
        wqkv: Linear.Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.wqkv = config.wqkv.build()
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, D] -> queries [B, L, N, H], keys and values [B, L, G, H]"""
        q, k, v = self.wqkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=-2)
        return q, k, v


class GatedFFN(FeedForward):
    """torchtitan's FFN with another activation than silu."""

    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        """torchtitan's, and what it computes."""

        activation: Activation

    def __init__(self, config: Config):
        super().__init__(config)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]"""
        return self.w2(ACTIVATIONS[self.activation](self.w1(x)) * self.w3(x))


class JoinedFFN(Module):
    """An FFN whose gate and up projection are one matrix, the gate's rows first."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Both matrices, and what it computes."""

        w13: Linear.Config
        w2: Linear.Config
        activation: Activation

    def __init__(self, config: Config):
        super().__init__()
        self.w13, self.w2, self.activation = config.w13.build(), config.w2.build(), config.activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]"""
        gate_BLF, up_BLF = self.w13(x).chunk(2, dim=-1)
        return self.w2(ACTIVATIONS[self.activation](gate_BLF) * up_BLF)
