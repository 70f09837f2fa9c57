"""GGUF in: the same tensors as transformers dequantises, and clear refusals."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import SIZES, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from lamella.conversion import Checkpoint, SliceOptions, convert
from lamella.errors import UserError
from lamella.hf.models import load

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


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tensors_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, family)
    source = Checkpoint.open(path)
    # For qwen3 transformers does not read head_dim from the file: it is told here.
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    config.head_dim = source.config["head_dim"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=config, dtype=torch.float32)
    expected = dense.state_dict()
    assert source.tensors.keys() == expected.keys()
    for name, tensor in source.tensors.items():
        whole = tensor.read(0, tensor.numel)
        assert torch.equal(whole.view(tensor.shape), expected[name]), name
        start, count = tensor.numel // 3, tensor.numel // 2
        assert torch.equal(tensor.read(start, count), whole[start : start + count]), name


def test_conversion_keeps_the_logits(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    convert(path, tmp_path / "moe", SliceOptions(slices=4))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.arange(64).view(2, 32)
    with torch.no_grad():
        difference = load(tmp_path / "moe")(tokens).logits - dense(tokens).logits
    assert difference.abs().max() <= 1e-5  # fp32, another order of summation; see test_convert.FP32_BOUND
    assert "license: mit" in (tmp_path / "moe/README.md").read_text()
    assert (tmp_path / "moe/generation_config.json").exists()


def test_refusals(tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.gguf", tmp_path / "moe"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(data[:-5000])
    with pytest.raises(UserError, match="truncated"):
        convert(path, out)
    path.write_bytes(b"GGML" + data[4:])
    with pytest.raises(UserError, match="not a GGUF file"):
        convert(path, out)
    write_gguf(path, extra={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match="scales its rope"):
        convert(path, out)
    write_gguf(path, rope="yarn")
    with pytest.raises(UserError, match="scales its rope"):
        convert(path, out)
    write_gguf(path, extra={"blk.0.strange.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match=r"not of this architecture: model\.layers\.0\.strange"):
        convert(path, out)
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.slow
def test_the_embedded_model_is_its_gguf(tmp_path: Path) -> None:
    from lamella.architecture.embedded import embedded_gguf

    from_gguf, folder = Checkpoint.open(embedded_gguf()), Checkpoint.open(None)
    assert from_gguf.tensors.keys() == folder.tensors.keys()
    for name, tensor in folder.tensors.items():
        assert torch.equal(from_gguf.tensors[name].read(0, tensor.numel), tensor.read(0, tensor.numel)), name
