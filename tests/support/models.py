"""Tiny real models for the tests: dense checkpoints of every family, converted ones, and a tokenizer of bytes.

All have random weights, three layers and a width of 32, and are saved as anyone would save them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from lamella.architecture.rows import FAMILIES

BOS, EOS = 256, 257
VOCAB = 258
CONFIGS = {name: CONFIG_MAPPING[name] for name in FAMILIES}
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
# The families that the training home has, each with what sets it apart there. The rope's original length is below
# the samples', so that the scaling shows.
TRAINABLE_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0, "original_max_position_embeddings": 16},
        "tie_word_embeddings": True, "attention_bias": True,
    },
    "mistral": {"sliding_window": 7},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "internlm3": {},
    "iquestcoder": {"head_dim": 16},
}  # fmt: skip
# Those that only the transformers home has, with Llama's FFN in a decoder of their own, each with what sets it apart.
_TWO_WINDOWS = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GEMMA = _TWO_WINDOWS | {"head_dim": 16, "tie_word_embeddings": True}
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
_ALPHA_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 1000.0}
KIN: dict[str, dict[str, Any]] = {
    "olmo2": {"attention_bias": True},
    "granite": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0,
        "tie_word_embeddings": True,
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "attention_bias": True} | _TWO_WINDOWS,
    "ministral": {"head_dim": 16} | _TWO_WINDOWS,
    "exaone4": {"head_dim": 16} | _TWO_WINDOWS,
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5, "attention_bias": True} | _TWO_WINDOWS,
    "olmo": {"clip_qkv": 0.3},
    "olmo3": {"attention_bias": True} | _TWO_WINDOWS,
    "ministral3": {
        "sliding_window": 7,
        "rope_parameters": _YARN | {"llama_4_scaling_beta": 0.1},
    },
    "cwm": {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 16}}
    | {"bos_token_id": 1, "eos_token_id": 2}  # its class wants numbers
    | _TWO_WINDOWS,
    "ernie4_5": {"tie_word_embeddings": True},
    "helium": {"attention_bias": True},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "head_dim": 16},
    "hunyuan_v1_dense": {"attention_bias": True, "rope_parameters": _ALPHA_ROPE},
    "hyperclovax": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 0.5,
        "use_post_norm": True,
    },
    "granite_swa": {
        "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 2.0,
        "layer_rope_theta": [10000.0, 500.0, 10000.0],
    } | _TWO_WINDOWS,
    "diffllama": {"attention_bias": True},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5} | _GEMMA,
    "gemma3_text": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 1.5} | _GEMMA,
    "vaultgemma": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0} | _GEMMA,
    "phi3": {"sliding_window": 7, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "glm": {},
    "glm4": {"head_dim": 16},
}  # fmt: skip
TRAINED_KIN = [name for name in KIN if FAMILIES[name].trains]
# The tests that try many variants leave out the families that differ from Llama in the decoder or the name alone.
WIDELY_TESTED = [name for name in CONFIGS if name not in KIN and not FAMILIES[name].also_called]
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


def save_tokenizer(folder: Path, add_bos: bool = False, has_bos: bool = True) -> Path:
    """Save a tokenizer of one token per byte; `<bos>`, unless `has_bos` is false, and `<eos>` are the last ids."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>", "eos_token": "<eos>"} if has_bos else {"eos_token": "<eos>"}
    tokenizer.add_special_tokens(list(special.values()))
    if add_bos:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A dense model with random weights; every tensor, biases and norms too, differs from its default."""
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


def tiny_checkpoint(
    folder: Path, family: str = "llama", sharded: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a tiny dense model to `folder`, in one file or in several with an index."""
    tiny_model(family, dtype, **changes).save_pretrained(folder, max_shard_size="40KB" if sharded else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return folder


def save_llama(folder: Path, *, layers: int = 2, ffn_width: int = 64, seed: int = 0, std: float = 0.2) -> Path:
    """Save a dense Llama as transformers begins one (norms 1), tied embeddings and the tokenizer with it.

    `std` is ten times the usual one, so that the logits are far from uniform.
    """
    torch.manual_seed(seed)
    own = {
        "num_hidden_layers": layers, "intermediate_size": ffn_width, "vocab_size": VOCAB, "initializer_range": std,
        "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": EOS,
        "pad_token_id": EOS,
    }  # fmt: skip
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | own)).save_pretrained(folder)
    return save_tokenizer(folder)


def tiny_moe(
    family: str,
    folder: Path,
    routing: str = "twin",
    slices: int = 4,
    random_router: bool = True,
    moe_changes: dict[str, Any] | None = None,
    heads: dict[str, Any] | None = None,
    **changes: Any,
) -> PreTrainedModel:
    """Save an MoE with random weights and biases (layer 1 dense) to `folder`; return transformers' model of it.

    heads: fields of an AttentionMoEConfig; None leaves attention dense.
    """
    from lamella.architecture.moe import AttentionMoEConfig, MoEConfig  # seconds that a tokenizer's user does not pay
    from lamella.hf.models import CONVERTED_MODELS

    torch.manual_seed(0)
    own = {"intermediate_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    values = SIZES | own | (TRAINABLE_FAMILIES | KIN)[family] | changes
    sliced = {
        "num_frozen_experts": slices,
        "num_trainable_experts": slices,
        "moe_intermediate_size": values["intermediate_size"] // slices,
        "num_experts_per_tok": slices,
        "moe_layers": [0, 2],
        "routing": routing,
        "route_scale": float(slices),
    }
    if family == "gemma":
        sliced["activation"] = "gelu_pytorch_tanh"
    moe = MoEConfig(**(sliced | (moe_changes or {})))
    model_class = CONVERTED_MODELS[family]
    attention = None if heads is None else AttentionMoEConfig(**heads).to_dict()
    model = model_class(model_class.config_class(**values, moe=moe.to_dict(), attention_moe=attention))
    _randomise(model, random_router)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def _randomise(model: Any, random_router: bool) -> None:
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


def trainable_moe(folder: Path, routing: str = "twin", slices: int = 4, **changes: Any) -> None:
    """Save a Llama MoE as conversion leaves it (router rows zero), with a tokenizer of 257 ids.

    No number of ranks divides 257.
    """
    tiny_moe("llama", folder, routing, slices, random_router=False, vocab_size=VOCAB - 1, **changes)
    save_tokenizer(folder, has_bos=False)
