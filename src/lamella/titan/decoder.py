"""The torchtitan home: a torchtitan Decoder whose FFNs are `MoELayer` layers.

Attention, norms, embeddings and rope are torchtitan's own; weights stay in the layout of transformers. The maths of the
experts is in `lamella.moe.experts.moe_ffn`.

Shapes: B batch, L sequence, N heads, H head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.common.attention import BaseAttention, create_attention_mask, get_sliding_window_mask_mod
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.rope import CosSinRoPE

from lamella.architecture.moe import Mode
from lamella.architecture.names import TITAN_LLAMA3
from lamella.titan.attention import ExpertAttention, RoutedHeads
from lamella.titan.context import ContextShare
from lamella.titan.inner_attention import DocumentAttention
from lamella.titan.masks import MaskMod, Masks, document_mask, document_mask_mod
from lamella.titan.moe import MoELayer
from lamella.titan.tensor import set_sharding

if TYPE_CHECKING:  # it takes seconds to import
    from torchtitan.trainer import Trainer


class ScaledRoPE(CosSinRoPE):
    """Torchtitan's rotary embedding in transformers' layout, with Llama 3.1's and linear frequency scaling too."""

    @dataclass(kw_only=True, slots=True)
    class Config(CosSinRoPE.Config):
        """torchtitan's rope, and a linear scaling of positions."""

        linear_factor: float = 1.0

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

    masks: Masks
    mode: Mode = "routed"
    choice_targets_B: Tensor | None = None


class Block(TransformerBlock):
    """Attention, then the MoE or, in layers that stay dense, torchtitan's feed-forward."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        """torchtitan's block, and the MoE layer where it has one."""

        # not `moe`, which torchtitan expects to be its own MoE
        moe_layer: MoELayer.Config | None = None

    def __init__(self, config: Config):
        super().__init__()
        self.attention = config.attention.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()
        self.moe_enabled = config.moe_layer is not None
        if config.moe_layer is not None:
            self.moe = config.moe_layer.build()
        else:
            assert config.feed_forward is not None
            self.feed_forward = config.feed_forward.build()

    def forward(self, x_BLD: Tensor, context: BlockContext, positions: Tensor | None = None) -> Tensor:
        """The hidden states [B, L, D] behind this block."""
        attended_BLD = self.attention_norm(x_BLD)
        if isinstance(self.attention, ExpertAttention):
            attended_BLD = self.attention(attended_BLD, context.masks, positions, context.mode)
        else:
            attended_BLD = self.attention(attended_BLD, context.masks, positions)
        x_BLD = x_BLD + attended_BLD
        if not self.moe_enabled:
            return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))
        return x_BLD + self.moe(self.ffn_norm(x_BLD), context.mode, context.choice_targets_B)


class LamellaDecoder(Decoder):
    """The model: ids and positions [B, L] -> logits [B, L, vocabulary], or [B, l, ...] of this rank's tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        """torchtitan's decoder, and what training wants to know about it."""

        sliding_window: int | None = None
        """Tokens that a token sees, itself among them."""
        trains: str = "experts+router"
        """As in a recipe."""
        frozen_weights: str = "sharded"
        file_dtype: str = "float32"
        """In which the model's file holds its weights, by torch's name."""
        """"sharded" or "replicated"."""

        def update_from_config(self, *, config: Trainer.Config, **kwargs: object) -> None:
            """torchtitan's hook: take over what the run's config says about the model."""
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            if config.parallelism.tensor_parallel_degree > 1:
                set_sharding(self)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """The model's (parameters, training FLOPs per token); see `lamella.titan.flops`."""
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
        """The layers whose FFNs are experts, in their order."""
        return [m for m in self.modules() if isinstance(m, MoELayer)]

    @property
    def routed_heads(self) -> list[RoutedHeads]:
        """The routing of the layers whose attention is experts, in their order."""
        return [m for m in self.modules() if isinstance(m, RoutedHeads)]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        attention_masks: Masks = None,
        choice_targets_B: Tensor | None = None,
        mode: Mode = "routed",
    ) -> Tensor:
        """Logits, float, of the shapes above.

        Args:
            positions: [B, L], from 0 in each document; None: one document per sample.
            attention_masks: of `get_attention_masks`; None: they are made from the positions.
            choice_targets_B: what each sample's tokens should choose; see `lamella.moe.balancing.pair_choice_loss`.
            mode: "dense" has every MoE layer compute its frozen slices alone, and attention all heads: the dense
                model that the experts came from.
        """
        if attention_masks is None:
            if positions is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            attention_masks = self.get_attention_masks(positions)
            if self.context is not None:
                positions = self.context.part(positions)
                # a later stage of a pipeline gets the activations of its part
                tokens = tokens if self.tok_embeddings is None else self.context.part(tokens)
        # torchtitan's decoder hands its third argument on to every block as it is
        return super().forward(tokens, positions, BlockContext(attention_masks, mode, choice_targets_B))

    def get_attention_masks(self, positions: Tensor) -> Masks:
        """The masks that the model's kind of attention wants, of positions [B, L]."""
        attention = self.config.first_attention
        if attention is not None and isinstance(attention.inner_attention, DocumentAttention.Config):
            return document_mask(positions, self.config.sliding_window, self.context)
        if self.context is not None:
            return self._flex_mask_of_part(positions, attention, self.context)
        return super().get_attention_masks(positions)

    def _flex_mask_of_part(
        self, positions_BL: Tensor, attention: BaseAttention.Config, context: ContextShare
    ) -> BlockMask:
        B, L = positions_BL.shape
        rows, columns = context.mine(L, positions_BL.device), context.order(L, positions_BL.device)
        sees = document_mask_mod(positions_BL, self.config.sliding_window, rows, columns)
        block_size = attention.inner_attention.block_size
        return create_attention_mask(sees, B, None, len(rows), L, device=positions_BL.device, BLOCK_SIZE=block_size)

    def _create_flex_attention_mask(
        self, positions: Tensor, attn_config: BaseAttention.Config, mask_mods: Sequence[MaskMod]
    ) -> BlockMask:
        window = self.config.sliding_window
        if window is not None:
            mask_mods = [*mask_mods, get_sliding_window_mask_mod(window)]
        return super()._create_flex_attention_mask(positions, attn_config, mask_mods)


def _drop_tied_head(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
    """A tied head is one tensor under two names; checkpoints hold it once, as in transformers."""
    state.pop(f"{prefix}lm_head.weight", None)
