"""Which of llama.cpp's architectures holds a model, and its tensors and metadata by llama.cpp's names.

`glm4moe` is the natural one: sigmoid or softmax scores, a selection bias, a scale; plain, linear or YaRN rope. Rope
factors as of Llama 3 are in none that fits but `step35`, which wants a layer with a sliding window: one layer whose
outputs are zero is appended. Both always add a shared expert, so its tensors are always written, zeros where the
model has none.

Shapes: E experts, f neurons per expert, D model width.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch

from lamella.architecture.families import HEAD
from lamella.architecture.moe_tensors import of_layer
from lamella.architecture.rows import GATED_GGUF
from lamella.checkpoint.pieces import Stretches, Values
from lamella.checkpoint.plan import OutputTensor
from lamella.export.experts import PARTS, Chain, Expert, experts, named, router, shared_expert, zero_expert
from lamella.export.model import EMBEDDING, ConvertedModel
from lamella.export.stock import (
    dense_layers_first,
    experts_needed,
    no_output_bias,
    no_window,
    pairs_hold,
    shared_is_multiple,
)
from lamella.jsons import Json

_TOP = {hf: gguf for gguf, hf in GATED_GGUF.top.items()}
_IN_LAYER = {hf: gguf for gguf, hf in GATED_GGUF.in_layer.items()}
_GATING = {"softmax": 1, "sigmoid": 2}  # llama.cpp's expert_gating_func
_ROPES = ("default", "linear", "yarn", "llama3")
_NARROW = 32  # neurons of parts that only have to be there; the width of a quantised block


def needs(model: ConvertedModel) -> list[str]:
    """What this model has that neither architecture holds."""
    if problems := experts_needed(model):
        return problems
    problems = dense_layers_first(model) + no_output_bias(model) + no_window(model)
    problems += shared_is_multiple(model) + pairs_hold(model)
    if model.moe.gate not in _GATING:
        problems.append(f"its gate is sigmoid or softmax, this model's is {model.moe.gate}")
    if model.rope_type not in _ROPES:
        problems.append(f"its rope is one of {', '.join(_ROPES)}, this model's is {model.rope_type}")
    if model.rope_type == "yarn" and not model.dense_hf.rope_parameters.get("truncate", True):
        problems.append("its YaRN rope rounds the range of dimensions, this model's does not (truncate)")
    if model.rope_type == "llama3" and model.attention.qkv_bias:
        problems.append(f"with llama3 rope its attention has no biases, that of {model.family.name} has")
    return problems


def describe(model: ConvertedModel) -> tuple[Json, list[OutputTensor], list[str]]:
    """Metadata, tensors, and what a reader should know of a model that fits."""
    tricks = []
    if not model.moe.shared_intermediate_size:
        tricks.append("an all-zero shared expert per layer: llama.cpp always adds one")
    name = "step35" if model.rope_type == "llama3" else "glm4moe"
    metadata = {"general.architecture": name}
    values = _common(model) | (_step35(model) if name == "step35" else _glm4moe(model))
    metadata |= {f"{name}.{key}": value for key, value in values.items()}
    tensors = [tensor for layer in model.moe.moe_layers for tensor in _experts(model, layer, name)]
    tensors = _backbone(model, name) + tensors
    if name == "step35":
        tensors += [_rope_factors(model), *_empty_layer(model)]
        tricks.append(
            "llama.cpp has Llama 3's rope factors for experts with a selection bias only in its architecture step35, "
            "which wants a layer with a sliding window: the last layer is such a one, all zero, and adds nothing"
        )
    return metadata, tensors, tricks


def _common(model: ConvertedModel) -> Json:
    hf, moe = model.dense_hf, model.moe
    head_dim = model.head_dim
    return {
        "block_count": hf.num_hidden_layers,
        "context_length": hf.max_position_embeddings,
        "embedding_length": hf.hidden_size,
        "feed_forward_length": hf.intermediate_size,
        "attention.head_count": hf.num_attention_heads,
        "attention.head_count_kv": hf.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(hf.rms_norm_eps),
        "rope.freq_base": float(hf.rope_parameters["rope_theta"]),
        "vocab_size": hf.vocab_size,
        "expert_count": moe.num_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_feed_forward_length": moe.moe_intermediate_size,
        "expert_weights_scale": float(moe.route_scale),
        "expert_weights_norm": moe.norm_topk_prob,
        "expert_gating_func": _GATING[moe.gate],
        "leading_dense_block_count": moe.moe_layers[0],
    }


def _glm4moe(model: ConvertedModel) -> Json:
    values: Json = {
        "rope.dimension_count": model.head_dim,
        "expert_shared_count": max(1, model.moe.shared_intermediate_size // model.moe.moe_intermediate_size),
    }
    rope = model.dense_hf.rope_parameters
    if model.rope_type != "default":
        values |= {"rope.scaling.type": model.rope_type, "rope.scaling.factor": float(rope["factor"])}
    if model.rope_type == "yarn":
        values |= {
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
            # llama.cpp multiplies this with the usual 0.1 ln(factor) + 1
            "rope.scaling.attn_factor": _yarn_attention(rope) / (1 + 0.1 * math.log(rope["factor"])),
        }
    return values


def _yarn_attention(rope: Json) -> float:
    """transformers' factor on the rotated queries and keys."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    log = math.log(rope["factor"]) if rope["factor"] > 1 else 0.0
    return (0.1 * mscale * log + 1) / (0.1 * all_dim * log + 1) if mscale and all_dim else 0.1 * log + 1


def _step35(model: ConvertedModel) -> Json:
    L = model.dense_hf.num_hidden_layers
    return {
        "block_count": L + 1,
        "feed_forward_length": _empty_width(model),
        "rope.dimension_count": 2 * model.head_dim,  # halved for layers without a window
        "rope.dimension_count_swa": model.head_dim,
        "attention.sliding_window": _NARROW,
        "attention.sliding_window_pattern": [False] * L + [True],
        "expert_shared_feed_forward_length": model.moe.shared_intermediate_size or _NARROW,
    }


def _backbone(model: ConvertedModel, architecture: str) -> list[OutputTensor]:
    tensors = []
    for name, source in model.tensors.items():
        if of_layer(name) or name.endswith(".rotary_emb.inv_freq"):
            continue
        tensors.append(OutputTensor(_gguf_name(name, architecture), source.dtype, source.shape, Stretches.copy(source)))
    if HEAD not in model.tensors and architecture == "step35":  # glm4moe takes the embedding where there is no head
        head = model.tensors[EMBEDDING]
        tensors.append(OutputTensor("output.weight", head.dtype, head.shape, Stretches.copy(head)))
    return tensors


def _gguf_name(name: str, architecture: str) -> str:
    stem, _, suffix = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if match is None:
        return f"{_TOP[stem]}.{suffix}"
    part = _IN_LAYER[match[2]]
    if part == "ffn_norm" and architecture == "glm4moe":
        part = "post_attention_norm"
    return f"blk.{match[1]}.{part}.{suffix}"


def _experts(model: ConvertedModel, layer: int, architecture: str) -> list[OutputTensor]:
    """All experts of a layer in three tensors [E, out, in], the shared one, the router and its bias."""
    block, every = f"blk.{layer}.", experts(model, layer)
    weight, bias = router(model, layer)
    tensors = [named(weight, f"{block}ffn_gate_inp.weight"), named(bias, f"{block}exp_probs_b.bias")]
    for part in PARTS:
        one, pieces = every[0][part], tuple(expert[part].piece for expert in every)
        tensors.append(
            OutputTensor(f"{block}ffn_{part}_exps.weight", one.dtype, (len(every), *one.shape), Chain(pieces))
        )
    width = _NARROW if architecture == "step35" else model.moe.moe_intermediate_size
    shared = shared_expert(model, layer) or zero_expert(width, weight.shape[1], weight.dtype)
    return tensors + _shared(shared, block)


def _shared(shared: Expert, block: str) -> list[OutputTensor]:
    return [named(shared[part], f"{block}ffn_{part}_shexp.weight") for part in PARTS]


def _rope_factors(model: ConvertedModel) -> OutputTensor:
    """[head_dim / 2]: what llama.cpp divides each frequency by, from transformers' own frequencies."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.dense_hf, torch.device("cpu"))
    head_dim, theta = model.head_dim, model.dense_hf.rope_parameters["rope_theta"]
    plain = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factors = plain / scaled.double().numpy()
    return OutputTensor("rope_freqs.weight", "F32", (head_dim // 2,), Values(tuple(factors.tolist())))


def _empty_width(model: ConvertedModel) -> int:
    """Of the appended layer's FFN: that of the dense layers, where there are any."""
    return model.dense_hf.intermediate_size if model.moe.moe_layers[0] else _NARROW


def _empty_layer(model: ConvertedModel) -> list[OutputTensor]:
    """The layer that step35 wants: attention and FFN whose last matrices, as all others, are zero."""
    hf, dtype = model.dense_hf, model.tensors[EMBEDDING].dtype
    D, q, kv = hf.hidden_size, hf.num_attention_heads * model.head_dim, hf.num_key_value_heads * model.head_dim
    block = f"blk.{hf.num_hidden_layers}."
    shapes = {"attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D), "attn_output": (D, q)}
    width = _empty_width(model)
    shapes |= {"ffn_gate": (width, D), "ffn_up": (width, D), "ffn_down": (D, width)}
    tensors = [
        OutputTensor(f"{block}{name}.weight", dtype, shape, Values((0.0,) * shape[0], shape[1]))
        for name, shape in shapes.items()
    ]
    norms = {"attn_norm": D, "ffn_norm": D}
    if model.attention.qk_norm:
        norms |= {"attn_q_norm": model.head_dim, "attn_k_norm": model.head_dim}
    return tensors + [
        OutputTensor(f"{block}{name}.weight", dtype, (n,), Values((1.0,), n)) for name, n in norms.items()
    ]
