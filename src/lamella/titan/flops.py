"""Floating point operations of a training step, for the model FLOPs utilisation."""

from __future__ import annotations

from torch import nn

from lamella.architecture.names import is_trained
from lamella.titan.decoder import LamellaDecoder


def training_flops_per_token(model: nn.Module, config: LamellaDecoder.Config, seq_len: int) -> int:
    """The FLOPs of the matmuls that a token needs.

    A weight takes 2 forward, 2 for the input's gradient, and 2 more where it trains. A token uses num_experts_per_tok
    of the experts; attention counts 12 * heads * head width * length per layer, as in the PaLM paper
    (arXiv 2204.02311), causal or not.
    """
    weights = _active_weights(model, config)
    flops = sum(count * (6 if is_trained(name, config.trains) else 4) for name, count in weights.items())
    return int(flops) + 12 * _attention_products(config) * seq_len


def forward_flops_per_token(model: nn.Module, config: LamellaDecoder.Config, seq_len: int) -> int:
    """The FLOPs of one forward pass, such as a teacher's: a third of the 12 above, and 2 per weight."""
    return int(2 * sum(_active_weights(model, config).values())) + 4 * _attention_products(config) * seq_len


def _active_weights(model: nn.Module, config: LamellaDecoder.Config) -> dict[str, float]:
    """Weights of each matrix that one token is multiplied with."""
    return {
        name: _active_part(name, config) * parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and (name != "tok_embeddings.weight" or config.enable_weight_tying)
    }


def _attention_products(config: LamellaDecoder.Config) -> int:
    attention = config.layers[0].attention
    return len(config.layers) * attention.n_heads * attention.head_dim


def _active_part(name: str, config: LamellaDecoder.Config) -> float:
    if ".experts." not in name:
        return 1.0
    moe = config.layers[int(name.split(".")[1])].moe_layer.moe
    return moe.num_experts_per_tok / moe.num_experts
