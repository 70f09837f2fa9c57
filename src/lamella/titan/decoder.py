"""The torchtitan home: a torchtitan Decoder whose FFNs are `MoELayer` layers.

Attention, norms, embeddings and rope are torchtitan's own; weights stay in the layout of transformers. The maths of the
experts is in `lamella.moe.experts.moe_ffn`.

Shapes: B batch, L sequence, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.models.common.attention import BaseAttention, create_attention_mask, get_sliding_window_mask_mod
from torchtitan.models.common.decoder import Decoder

from lamella.architecture.moe import Mode
from lamella.titan.attention import RoutedHeads
from lamella.titan.block import BlockContext
from lamella.titan.context import ContextShare
from lamella.titan.flops import training_flops_per_token
from lamella.titan.inner_attention import DocumentAttention
from lamella.titan.masks import MaskMod, Masks, MasksByWindow, document_mask, document_mask_mod
from lamella.titan.moe import MoELayer
from lamella.titan.tensor import set_sharding

if TYPE_CHECKING:  # it takes seconds to import
    from torchtitan.trainer import Trainer


class LamellaDecoder(Decoder):
    """The model: ids and positions [B, L] -> logits [B, L, vocabulary], or [B, l, ...] of this rank's tokens."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        """torchtitan's decoder, and what training wants to know about it."""

        sliding_window: int | None = None
        """Tokens that a token sees, itself among them; None where layers differ."""
        windows: tuple[int | None, ...] = ()
        """Where layers differ, the windows that there are."""
        trains: str = "experts+router"
        """As in a recipe."""
        frozen_weights: str = "sharded"
        """"sharded" or "replicated"."""
        offloads_frozen: bool = False
        """Frozen experts wait in main memory."""
        file_dtype: str = "float32"
        """The model's file holds its weights in this dtype, by torch's name."""

        def update_from_config(self, *, config: Trainer.Config, **kwargs: object) -> None:
            """torchtitan's hook: take over what the run's config says about the model."""
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            if config.parallelism.tensor_parallel_degree > 1:
                set_sharding(self)

        def get_nparams_and_flops(self, model: nn.Module, seq_len: int) -> tuple[int, int]:
            """The model's (parameters, training FLOPs per token); see `lamella.titan.flops`."""
            flops = training_flops_per_token(
                model, self.layers, seq_len, trains=self.trains, tied=self.enable_weight_tying
            )
            return sum(p.numel() for p in model.parameters()), flops

    def __init__(self, config: Config):
        super().__init__(config)
        self._window = config.sliding_window
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
        attention_masks: Masks | MasksByWindow = None,
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

    def get_attention_masks(self, positions: Tensor) -> Masks | MasksByWindow:
        """The masks that the model's kind of attention wants, of positions [B, L]."""
        if self.config.windows:
            return MasksByWindow({window: self._masks(positions, window) for window in self.config.windows})
        return self._masks(positions, self.config.sliding_window)

    def _masks(self, positions: Tensor, window: int | None) -> Masks:
        self._window = window  # torchtitan hands its own functions no window
        attention = self.config.first_attention
        if attention is not None and isinstance(attention.inner_attention, DocumentAttention.Config):
            return document_mask(positions, window, self.context)
        if self.context is not None:
            return self._flex_mask_of_part(positions, attention, self.context)
        return super().get_attention_masks(positions)

    def _flex_mask_of_part(
        self, positions_BL: Tensor, attention: BaseAttention.Config, context: ContextShare
    ) -> BlockMask:
        B, L = positions_BL.shape
        rows, columns = context.mine(L, positions_BL.device), context.order(L, positions_BL.device)
        sees = document_mask_mod(positions_BL, self._window, rows, columns)
        block_size = attention.inner_attention.block_size
        return create_attention_mask(sees, B, None, len(rows), L, device=positions_BL.device, BLOCK_SIZE=block_size)

    def _create_flex_attention_mask(
        self, positions: Tensor, attn_config: BaseAttention.Config, mask_mods: Sequence[MaskMod]
    ) -> BlockMask:
        if self._window is not None:
            mask_mods = [*mask_mods, get_sliding_window_mask_mod(self._window)]
        return super()._create_flex_attention_mask(positions, attn_config, mask_mods)


def _drop_tied_head(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: object) -> None:
    """A tied head is one tensor under two names; checkpoints hold it once, as in transformers."""
    state.pop(f"{prefix}lm_head.weight", None)
