"""Tiny converted models for the tests of the torchtitan home."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.architecture.names import from_hf
from lamella.hf.models import CONVERTED_MODELS
from lamella.titan.config import decoder_config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # below the samples' length, so that the scaling shows
}
FAMILIES = {
    "llama": {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "attention_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


# Single heads, of which two share a key/value head; a token chooses three.
HEADS = {"layers": [0, 1], "num_experts": 4, "num_experts_per_tok": 3}
# A model of experts that all train, as partitioning makes it: every field of the config away from its default.
PARTITIONED = {
    "routing": "flat",
    "num_frozen_experts": 0,
    "num_trainable_experts": 6,
    "num_experts_per_tok": 2,
    "gate": "unit",
    "router": "analytic",
    "shared_intermediate_size": 16,
    "output_bias": True,
    "per_layer": {2: {"num_trainable_experts": 5, "num_experts_per_tok": 1, "shared_intermediate_size": 24}},
}


def tiny_moe(
    family: str,
    folder: Path,
    routing: str = "twin",
    slices: int = 4,
    random_router: bool = True,
    moe_changes: dict | None = None,
    heads: dict | None = None,
    **changes,
):
    """Save a tiny MoE with random weights and biases (layer 1 dense) to `folder`; return transformers' model of it.

    heads: fields of an AttentionMoEConfig; None leaves attention dense.
    """
    torch.manual_seed(0)
    values = TINY | FAMILIES[family] | changes
    sliced = {
        "num_frozen_experts": slices,
        "num_trainable_experts": slices,
        "moe_intermediate_size": values["intermediate_size"] // slices,
        "num_experts_per_tok": slices,
        "moe_layers": [0, 2],
        "routing": routing,
        "route_scale": float(slices),
    }
    moe = MoEConfig(**(sliced | (moe_changes or {})))
    model_class = CONVERTED_MODELS[family]
    attention = None if heads is None else AttentionMoEConfig(**heads).to_dict()
    model = model_class(model_class.config_class(**values, moe=moe.to_dict(), attention_moe=attention))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(".bias") or "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
            elif "mlp" in name or "proj" in name:  # the router's up rows, gate scale and output bias as well
                tensor.normal_(std=0.2)
        for layer in model.moe_layers:
            if random_router:
                layer.router.weight.normal_(std=0.3)
                layer.router.selection_bias.normal_(std=0.1)
            else:
                layer.router.weight.zero_()
        for attention in model.attention_experts:
            attention.router.weight.normal_(std=0.3)
            attention.router.selection_bias.normal_(std=0.1)
            if attention.router.gate_scale is not None:
                attention.router.gate_scale.normal_(std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def load_titan(folder: Path):
    """The torchtitan model of the folder, weights loaded, in evaluation mode."""
    with torch.device("meta"):
        model = decoder_config(folder).build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    model.load_state_dict(from_hf(load_file(folder / "model.safetensors")), strict=False)
    assert not any(t.isnan().any() for t in [*model.parameters(), *model.buffers()])
    return model.eval()


def byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer of single bytes and an end-of-text token: 257 ids, which no number of ranks divides."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0} | {c: i for i, c in enumerate(alphabet, 1)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def trainable_moe(folder: Path, routing: str = "twin", slices: int = 4, **changes) -> None:
    """A tiny Llama MoE as conversion leaves it (router rows zero), with its tokenizer."""
    tiny_moe("llama", folder, routing, slices, random_router=False, vocab_size=257, **changes)
    byte_tokenizer(folder)
