"""The torchtitan home: a torchtitan Decoder whose FFNs are `MoELayer` layers.

Attention, norms, embeddings and rope are torchtitan's own; weights stay in the layout of transformers. The maths of the
experts is in `lamella.moe.experts.moe_ffn`.

Shapes: B batch, L sequence, N heads, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtitan.models.common.attention import (
    FlexAttention,
    VarlenAttention,
    create_attention_mask,
    get_sliding_window_mask_mod,
)
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.rope import CosSinRoPE
from torchtitan.protocols.module import Module

from lamella.titan.attention import RoutedHeads
from lamella.titan.context import ContextShare
from lamella.titan.moe import MoELayer
from lamella.titan.tensor import set_sharding


class DocumentAttention(Module):
    """Scaled dot product attention under an explicit mask: runs, with its backward, on any device."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Tensor,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q_BNLH, k_BNLH, v_BNLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        y_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
        )
        return y_BNLH.transpose(1, 2)


def document_mask(positions_BL: Tensor, window: int | None = None, context: ContextShare | None = None) -> Tensor:
    """[B, 1, L, L] bool: each token sees itself and what precedes it in its document, at most `window` tokens.

    With a context share [B, 1, l, L]: this rank's tokens as rows, columns in the order of the ranks.
    """
    B, L = positions_BL.shape
    batch, every = (torch.arange(n, device=positions_BL.device) for n in (B, L))
    rows, columns = (
        (every, every) if context is None else (context.mine(L, every.device), context.order(L, every.device))
    )
    sees = document_mask_mod(positions_BL, window, rows, columns)
    return sees(batch[:, None, None, None], 0, torch.arange(len(rows), device=every.device)[:, None], every)


def document_mask_mod(positions_BL: Tensor, window: int | None, rows: Tensor, columns: Tensor) -> Any:
    """The same as FlexAttention asks for it; `rows` and `columns` name the tokens of queries and keys."""
    document_BL = (positions_BL == 0).cumsum(dim=1)

    def sees(b: Tensor, head: Any, q: Tensor, k: Tensor) -> Tensor:
        query, key = rows[q], columns[k]
        near = (query >= key) if window is None else (query >= key) & (query - key < window)
        return near & (document_BL[b, query] == document_BL[b, key])

    return sees


class ScaledRoPE(CosSinRoPE):
    """Torchtitan's rotary embedding in transformers' layout, with Llama 3.1's and linear frequency scaling too."""

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        linear_factor: float = 1.0

    def _precompute_cache(self) -> Tensor:
        c = self.config
        frequencies = 1.0 / (c.theta ** (torch.arange(0, c.dim, 2).float() / c.dim)) / c.linear_factor
        if c.scaling == "llama":
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


class Block(TransformerBlock):
    """Attention, then the MoE or, in layers that stay dense, torchtitan's feed-forward."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        # not `moe`, which torchtitan expects to be its own MoE
        moe_layer: MoELayer.Config | None = None

    def __init__(self, config: Config):
        super().__init__()
        self.attention = config.attention.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()
        self.moe_enabled = config.moe_layer is not None  # torchtitan's FSDP reads it
        if config.moe_layer is not None:
            self.moe = config.moe_layer.build()
        else:
            assert config.feed_forward is not None
            self.feed_forward = config.feed_forward.build()

    def forward(self, x_BLD: Tensor, attention_masks: Any, positions: Tensor | None = None) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), attention_masks, positions)
        ffn = self.moe if self.moe_enabled else self.feed_forward
        return x_BLD + ffn(self.ffn_norm(x_BLD))


class LamellaDecoder(Decoder):
    """[B, L] token ids and positions -> [B, L, vocabulary] logits, or [B, l, ...] of this rank's l tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        sliding_window: int | None = None
        trains: str = "experts+router"
        frozen_weights: str = "sharded"

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            if config.parallelism.tensor_parallel_degree > 1:
                set_sharding(self)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """(parameters, training FLOPs per token); see `lamella.titan.flops`."""
            from lamella.titan.flops import training_flops_per_token

            return sum(p.numel() for p in model.parameters()), training_flops_per_token(model, self, seq_len)

    def __init__(self, config: Config):
        super().__init__(config)
        self.context: ContextShare | None = None
        """Context parallelism: whole samples go in, the logits of this rank's tokens come out."""
        if config.enable_weight_tying:
            self.register_state_dict_post_hook(_drop_tied_head)

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [m for m in self.modules() if isinstance(m, MoELayer)]

    @property
    def routed_heads(self) -> list[RoutedHeads]:
        return [m for m in self.modules() if isinstance(m, RoutedHeads)]

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, every MoE layer computes its frozen slices alone, and attention all heads: the dense model that the
        experts came from."""
        routed = [*self.moe_layers, *self.routed_heads]
        for layer in routed:
            layer.mode = "dense"
        try:
            yield
        finally:
            for layer in routed:
                layer.mode = "routed"

    def forward(self, tokens: Tensor, positions: Tensor | None = None, attention_masks: Any = None) -> Tensor:
        if attention_masks is None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            attention_masks = self.get_attention_masks(positions)
            if self.context is not None:
                positions = self.context.part(positions)
                # a later stage of a pipeline gets the activations of its part
                tokens = tokens if self.tok_embeddings is None else self.context.part(tokens)
        return super().forward(tokens, positions, attention_masks)

    def get_attention_masks(self, positions: Tensor) -> Any:
        attention = self.config.first_attention
        if attention is not None and isinstance(attention.inner_attention, DocumentAttention.Config):
            return document_mask(positions, self.config.sliding_window, self.context)
        if self.context is not None:
            return self._flex_mask_of_part(positions, attention, self.context)
        return super().get_attention_masks(positions)

    def _flex_mask_of_part(self, positions_BL: Tensor, attention: Any, context: ContextShare) -> Any:
        B, L = positions_BL.shape
        rows, columns = context.mine(L, positions_BL.device), context.order(L, positions_BL.device)
        sees = document_mask_mod(positions_BL, self.config.sliding_window, rows, columns)
        block_size = attention.inner_attention.block_size
        return create_attention_mask(sees, B, None, len(rows), L, device=positions_BL.device, BLOCK_SIZE=block_size)

    def _create_flex_attention_mask(self, positions: Tensor, attn_config: Any, mask_mods: Any) -> Any:
        window = self.config.sliding_window
        if window is not None:
            mask_mods = [*mask_mods, get_sliding_window_mask_mod(window)]
        return super()._create_flex_attention_mask(positions, attn_config, mask_mods)


def _drop_tied_head(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A tied head is one tensor under two names; checkpoints hold it once, as in transformers."""
    state.pop(f"{prefix}lm_head.weight", None)


def inner_attention(kind: str, sliding_window: int | None) -> Module.Config:
    """`kind` is sdpa, flex or varlen."""
    if kind == "sdpa":
        return DocumentAttention.Config()
    if kind == "flex":
        return FlexAttention.Config()
    return VarlenAttention.Config(window_size=(-1 if sliding_window is None else sliding_window - 1, 0))
