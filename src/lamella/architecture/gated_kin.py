"""Gated decoders that are not quite Llama's: transformers' names of a layer's tensors, with their shapes.

The FFN is Llama's. Norms, biases and what is scaled between the parts are each family's own, and transformers' classes
compute them; so these families have no names in torchtitan. The letters of shapes are those of `gated`.
"""

from __future__ import annotations

from lamella.architecture.gated import LAYER, shapes_of
from lamella.architecture.types import Part, Shapes, Sizes

_LAYER = "model.layers.{}."
_FINAL_BIAS = "model.norm.bias"
_IN_NORM, _OUT_NORM = f"{_LAYER}input_layernorm", f"{_LAYER}post_attention_layernorm"
_BETWEEN = tuple(part for part in LAYER if not part.hf.startswith(_IN_NORM))


def _norm(name: str, shape: str) -> Part:
    return Part(f"{_LAYER}{name}.weight", "", shape)


NORMS_BEHIND = (*_BETWEEN, _norm("post_feedforward_layernorm", "D"))
"""Norms behind attention and FFN, none before; queries and keys have one for each head's width if `qk_norm`."""
WIDE_NORMS = (*NORMS_BEHIND, _norm("self_attn.q_norm", "Q"), _norm("self_attn.k_norm", "K"))
"""The same, with norms over all query heads and over all key heads."""


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
