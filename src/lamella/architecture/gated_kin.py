"""Gated decoders that are not quite Llama's: transformers' names of a layer's tensors, with their shapes.

The FFN is Llama's. Norms, biases and what is scaled between the parts are each family's own, and transformers' classes
compute them; those that the training home can express have names in torchtitan. Letters of shapes as in `gated`.
"""

from __future__ import annotations

from lamella.architecture.gated import LAYER, shapes_of
from lamella.architecture.types import Part, Shapes, Sizes

_LAYER = "model.layers.{}."
_FINAL_BIAS = "model.norm.bias"
_IN_NORM, _OUT_NORM = f"{_LAYER}input_layernorm", f"{_LAYER}post_attention_layernorm"
_BETWEEN = tuple(part for part in LAYER if not part.hf.startswith(_IN_NORM))


def _norm(name: str, shape: str, titan: str = "") -> Part:
    return Part(f"{_LAYER}{name}.weight", f"layers.{{}}.{titan}.weight" if titan else "", shape)


NORMS_BEHIND = (*_BETWEEN, _norm("post_feedforward_layernorm", "D", "post_ffn_norm"))
"""Norms behind attention and FFN, none before; queries and keys have one for each head's width if `qk_norm`."""
WIDE_NORMS = (
    *NORMS_BEHIND,
    _norm("self_attn.q_norm", "Q", "attention.q_norm"),
    _norm("self_attn.k_norm", "K", "attention.k_norm"),
)
"""The same, with norms over all query heads and over all key heads."""
_FFN_NORMS = tuple(_norm(f"{place}_feedforward_layernorm", "D") for place in ("pre", "post"))
NORMS_AROUND = (*LAYER, *_FFN_NORMS)
"""Norms before and behind both attention and FFN."""
NORMS_BEFORE = (*(part for part in LAYER if not part.hf.startswith(_OUT_NORM)), _FFN_NORMS[0])
"""Norms before both, as in Llama, the second under another name."""
NAMED_QK_NORMS = (*LAYER, *(_norm(f"self_attn.{kind}_layernorm", "H") for kind in ("query", "key")))
"""A norm for the queries and one for the keys, of each head's width."""
SINKS = (*LAYER, Part(f"{_LAYER}self_attn.sinks", "", "N"))
"""Each query head has a learned logit that no token stands behind."""
DIFFERENTIAL = (
    *LAYER,
    *(Part(f"{_LAYER}self_attn.lambda_{kind}{number}", "", "H") for kind in "qk" for number in (1, 2)),
)
"""The difference of two attentions, weighed by learned vectors (arXiv 2410.05258)."""
_FUSED_GATE_UP = Part(f"{_LAYER}mlp.gate_up_proj.weight", "layers.{}.feed_forward.w13.weight", "2F D")


def _fused(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """Gate and up projection are one matrix."""
    separate = ("mlp.gate_proj.", "mlp.up_proj.")
    return (*(part for part in parts if not any(name in part.hf for name in separate)), _FUSED_GATE_UP)


FUSED_FFN = _fused(LAYER)
FUSED_FFN_NORMS = (*FUSED_FFN, _norm("post_self_attn_layernorm", "D"), _norm("post_mlp_layernorm", "D"))
"""The same, and norms behind attention and FFN as well."""
FUSED_QKV = (
    *(part for part in FUSED_FFN if not any(f"self_attn.{kind}_proj" in part.hf for kind in "qkv")),
    Part(f"{_LAYER}self_attn.qkv_proj.weight", "layers.{}.attention.qkv_linear.wqkv.weight", "Q+2K D"),
)
"""Query, key and value projection are one matrix, too."""


def olmo_tensors(sizes: Sizes) -> Shapes:
    """Its norms have no weights."""
    parts = [part for part in LAYER if not part.hf.startswith((_IN_NORM, _OUT_NORM))]
    return shapes_of(sizes, parts, final_norm=False)


def hyperclovax_tensors(sizes: Sizes) -> Shapes:
    """With `use_post_norm` norms behind attention and FFN as well."""
    behind = [_norm(f"post_norm{number}", "D") for number in (1, 2)] if sizes.values["use_post_norm"] else []
    return shapes_of(sizes, [*LAYER, *behind])


def stablelm_tensors(sizes: Sizes) -> Shapes:
    """Layer norms with biases; a norm for each query and key head if `qk_layernorm`; with `use_parallel_residual`
    attention and FFN share the norm before them."""
    parts = [*LAYER, Part(f"{_IN_NORM}.bias", "", "D"), Part(f"{_OUT_NORM}.bias", "", "D")]
    if sizes.values["use_parallel_residual"]:
        parts = [part for part in parts if not part.hf.startswith(_OUT_NORM)]
    if sizes.values["qk_layernorm"]:
        for kind, heads in (("q", sizes.N), ("k", sizes.G)):
            parts += [_norm(f"self_attn.{kind}_layernorm.norms.{head}", "H") for head in range(heads)]
    return shapes_of(sizes, parts) | {_FINAL_BIAS: (sizes.D,)}


def cohere_tensors(sizes: Sizes) -> Shapes:
    """Attention and FFN share the norm before them; `use_qk_norm` norms each query and key head by its own weights."""
    parts = [part for part in LAYER if not part.hf.startswith(_OUT_NORM)]
    shapes = shapes_of(sizes, parts)
    if sizes.values.get("use_qk_norm", False):
        for layer in range(sizes.num_layers):
            for kind, heads in (("q", sizes.N), ("k", sizes.G)):
                shapes[f"model.layers.{layer}.self_attn.{kind}_norm.weight"] = (heads, sizes.H)
    return shapes
