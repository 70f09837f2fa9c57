"""Converted models with random weights everywhere, as training may leave them, of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import torch

from lamella.architecture.moe import MoEConfig
from lamella.hf.models import CONVERTED_MODELS

S, D, F, LAYERS, VOCAB = 4, 32, 64, 3, 128
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def save_trained(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, selection_bias: bool = True, **changes
) -> Path:
    """A sliced model as training may leave it: every tensor random, routers and biases too."""
    torch.manual_seed(0)
    moe = {
        "num_frozen_experts": S,
        "num_trainable_experts": S,
        "moe_intermediate_size": F // S,
        "num_experts_per_tok": S,
    }
    moe |= {"moe_layers": tuple(range(LAYERS)), "route_scale": float(S)} | changes.pop("moe", {})
    values = {
        "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 256, "initializer_range": 0.2,
    } | changes  # fmt: skip
    model_class = CONVERTED_MODELS[family]
    model = model_class(model_class.config_class(**values, moe=MoEConfig(**moe).to_dict())).to(dtype)
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.3)
        layer.router.selection_bias = torch.randn_like(layer.router.selection_bias, dtype=torch.float32) * 0.2
        layer.router.selection_bias *= selection_bias
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder
