"""GGUF files of tiny models, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch

from support.models import SIZES, tiny_model

D, F, HEADS, KV_HEADS = (
    SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
)
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[part]}.{suffix}"
    return f"{NAMES[stem]}.{suffix}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """A head's two halves of rows, taken alternately: llama.cpp's order for llama's q and k."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, family: str = "llama", extra: dict[str, np.ndarray] | None = None, rope: str | None = None
) -> torch.nn.Module:
    """A tiny model as llama.cpp's converter writes it: matrices Q8_0, the rest float32."""
    model = tiny_model(family)
    writer = gguf.GGUFWriter(path, family)
    writer.add_license("mit")
    for key, value in {
        "vocab_size": 128, "context_length": 256, "embedding_length": D, "block_count": 3, "feed_forward_length": F,
        "rope_dimension_count": 8, "head_count": HEADS, "head_count_kv": KV_HEADS, "key_length": 8, "value_length": 8,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    if rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope))
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if family == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleaved(array, HEADS if "q_proj" in name else KV_HEADS)
        quantised = array.ndim == 2 and array.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(array, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
