"""Floating point operations of a training step, for the model FLOPs utilisation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lamella.architecture.names import is_trained
from lamella.titan.block import Block


def training_flops_per_token(
    model: nn.Module, blocks: Sequence[Block.Config], seq_len: int, *, trains: str, tied: bool
) -> int:
    """The FLOPs of the matmuls that a token needs.

    A weight takes 2 forward, 2 for the input's gradient, and 2 more where it trains. A token uses num_experts_per_tok
    of the experts; attention counts 12 * heads * head width * length per layer, as in the PaLM paper
    (arXiv 2204.02311), causal or not.

    Args:
        blocks: the config of every layer.
        trains: as in a recipe.
        tied: the embedding is the output head, too.
    """
    weights = _active_weights(model, blocks, tied)
    flops = sum(count * (6 if is_trained(name, trains) else 4) for name, count in weights.items())
    return int(flops) + 12 * _attention_products(blocks) * seq_len


def forward_flops_per_token(model: nn.Module, blocks: Sequence[Block.Config], seq_len: int, *, tied: bool) -> int:
    """The FLOPs of one forward pass, such as a teacher's: a third of the 12 above, and 2 per weight."""
    return int(2 * sum(_active_weights(model, blocks, tied).values())) + 4 * _attention_products(blocks) * seq_len


def _active_weights(model: nn.Module, blocks: Sequence[Block.Config], tied: bool) -> dict[str, float]:
    """Weights of each matrix that one token is multiplied with."""
    return {
        name: _active_part(name, blocks) * parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and (name != "tok_embeddings.weight" or tied)
    }


def _attention_products(blocks: Sequence[Block.Config]) -> int:
    attention = blocks[0].attention
    return len(blocks) * attention.n_heads * attention.head_dim


def _active_part(name: str, blocks: Sequence[Block.Config]) -> float:
    if ".experts." not in name:
        return 1.0
    layer = blocks[int(name.split(".")[1])].moe_layer
    assert layer is not None
    return layer.moe.num_experts_per_tok / layer.moe.num_experts
