"""Floating point operations of a training step, for the model FLOPs utilisation."""

from __future__ import annotations

from torch import nn

from lamella.models.titan import LamellaDecoder
from lamella.train.parallel import is_trained


def training_flops_per_token(model: nn.Module, config: LamellaDecoder.Config, seq_len: int) -> int:
    """Of the matmuls that one token needs: 2 per weight forward, 2 for the input's gradient, 2 more where it trains.

    A token uses num_experts_per_tok of the experts; attention counts 12 * heads * head width * length per layer, as in
    the PaLM paper (arXiv 2204.02311), causal or not.
    """
    flops = 0.0
    for name, parameter in model.named_parameters():
        embedding = name == "tok_embeddings.weight" and not config.enable_weight_tying
        if parameter.dim() >= 2 and not embedding:
            active = _active_part(name, config)
            flops += active * parameter.numel() * (6 if is_trained(name, config.trains) else 4)
    attention = config.layers[0].attention
    flops += 12 * len(config.layers) * attention.n_heads * attention.head_dim * seq_len
    return int(flops)


def _active_part(name: str, config: LamellaDecoder.Config) -> float:
    if ".experts." not in name:
        return 1.0
    moe = config.layers[int(name.split(".")[1])].sliced_moe.moe
    return moe.num_experts_per_tok / moe.num_experts
