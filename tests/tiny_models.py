"""Tiny dense checkpoints of every family, made with transformers and saved as anyone would save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

CONFIGS = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "gpt2": GPT2Config,
    "opt": OPTConfig,
}  # fmt: skip
# What these call the width of the FFN; they have neither key-value heads nor a head_dim of their own.
TWO_MATRIX = {"gpt2": "n_inner", "opt": "ffn_dim"}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights; every tensor, biases and norms too, differs from its default."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**_sizes(family) | changes), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            parameter.normal_(mean=float(is_norm and name.endswith("weight")), std=0.1)
    return model.eval()


def _sizes(family: str) -> dict[str, Any]:
    if family not in TWO_MATRIX:
        return SIZES
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
    return sizes | {TWO_MATRIX[family]: sizes.pop("intermediate_size")}


def moe_prefix(family: str, layer: int) -> str:
    """Of a converted layer's tensors."""
    prefixes = {"gpt2": f"transformer.h.{layer}.mlp.", "opt": f"model.decoder.layers.{layer}.fc1."}
    return prefixes.get(family, f"model.layers.{layer}.mlp.")


def dense_ffn(tensors: dict[str, torch.Tensor], family: str, layer: int) -> dict[str, torch.Tensor]:
    """A layer's FFN of a dense checkpoint by dense name, as stored."""
    parts = {
        "gpt2": [f"transformer.h.{layer}.mlp.{part}." for part in ("c_fc", "c_proj")],
        "opt": [f"model.decoder.layers.{layer}.{part}." for part in ("fc1", "fc2")],
    }
    prefixes = parts.get(family, [f"model.layers.{layer}.mlp."])
    return {name: tensor for name, tensor in tensors.items() if name.startswith(tuple(prefixes))}


def sliced_by_hand(ffn: dict[str, torch.Tensor], family: str, slices: int) -> dict[str, torch.Tensor]:
    """`dense_ffn`, whose order is that of the names, -> the packed tensors of its slices, slice by slice."""
    by_name = dict(sorted(ffn.items()))
    if family not in TWO_MATRIX:
        down_DF, gate_FD, up_FD = by_name.values()
        pairs = zip(gate_FD.chunk(slices), up_FD.chunk(slices), strict=True)
        packed = {"gate_up_proj": torch.stack([torch.cat(pair) for pair in pairs])}
    else:
        up_bias_F, up_FD, _, down_DF = by_name.values()
        if family == "gpt2":
            up_FD, down_DF = up_FD.T, down_DF.T
        packed = {"up_proj": torch.stack(up_FD.chunk(slices)), "up_bias": torch.stack(up_bias_F.chunk(slices))}
    return packed | {"down_proj": torch.stack(down_DF.chunk(slices, dim=1))}


def tiny_checkpoint(
    folder: Path, family: str = "llama", sharded: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A tiny model saved to `folder`, in one file or in several with an index."""
    model = tiny_model(family, dtype, **changes)
    model.save_pretrained(folder, max_shard_size="40KB" if sharded else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return folder
