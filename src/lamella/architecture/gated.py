"""Decoders whose FFN is gated, down(act(gate x) * up x): the tensors of a layer, in transformers' and torchtitan's
spelling, with their shapes.

Shapes: D model width, F dense FFN width, V vocabulary, N query heads, H head width, Q = N * H, K = key/value heads * H.
"""

from __future__ import annotations

from collections.abc import Iterable

from lamella.architecture.types import Part, Shapes, Sizes

EMBEDDING = Part("model.embed_tokens.weight", "tok_embeddings.weight", "V D")
FINAL_NORM = Part("model.norm.weight", "norm.weight", "D")
HEAD = Part("lm_head.weight", "lm_head.weight", "V D")

_LAYER, _TITAN_LAYER = "model.layers.{}.", "layers.{}."
_ATTENTION = (
    ("q_proj", "qkv_linear.wq", "Q", "D"),
    ("k_proj", "qkv_linear.wk", "K", "D"),
    ("v_proj", "qkv_linear.wv", "K", "D"),
    ("o_proj", "wo", "D", "Q"),
)
_FFN = (("gate_proj", "w1", "F", "D"), ("up_proj", "w3", "F", "D"), ("down_proj", "w2", "D", "F"))


def _layer_parts() -> Iterable[Part]:
    yield Part("input_layernorm.weight", "attention_norm.weight", "D")
    for hf, titan, rows, columns in _ATTENTION:
        yield Part(f"self_attn.{hf}.weight", f"attention.{titan}.weight", f"{rows} {columns}")
    for hf, titan, rows, _ in _ATTENTION:
        has_it = "output_bias" if hf == "o_proj" else "qkv_bias"
        yield Part(f"self_attn.{hf}.bias", f"attention.{titan}.bias", rows, has_it)
    for norm in ("q_norm", "k_norm"):
        yield Part(f"self_attn.{norm}.weight", f"attention.{norm}.weight", "H", "qk_norm")
    yield Part("post_attention_layernorm.weight", "ffn_norm.weight", "D")
    for hf, titan, rows, columns in _FFN:
        yield Part(f"mlp.{hf}.weight", f"feed_forward.{titan}.weight", f"{rows} {columns}")
        yield Part(f"mlp.{hf}.bias", f"feed_forward.{titan}.bias", rows, "mlp_bias")


LAYER = tuple(Part(_LAYER + part.hf, _TITAN_LAYER + part.titan, *part[2:]) for part in _layer_parts())
"""A Llama-like layer, in the order in which a checkpoint of ours holds it."""


def gated_tensors(sizes: Sizes) -> Shapes:
    """All tensors of the dense model but the output head, in the order of the model."""
    return shapes_of(sizes, sizes.family.layer)


def shapes_of(sizes: Sizes, layer_parts: Iterable[Part], final_norm: bool = True) -> Shapes:
    """The same, with these tensors in each layer; `final_norm`: the norm behind the last one has a weight."""
    letters = {
        "D": sizes.D, "F": sizes.F, "V": sizes.V, "N": sizes.N, "H": sizes.H, "Q": sizes.N * sizes.H,
        "K": sizes.G * sizes.H, "2F": 2 * sizes.F, "Q+2K": (sizes.N + 2 * sizes.G) * sizes.H,
    }  # fmt: skip

    def shape(part: Part) -> tuple[int, ...]:
        return tuple(letters[letter] for letter in part.shape.split())

    parts = [part for part in layer_parts if part.only_if is None or getattr(sizes, part.only_if)]
    shapes: Shapes = {EMBEDDING.hf: shape(EMBEDDING)}
    for layer in range(sizes.num_layers):
        shapes |= {part.hf.format(layer): shape(part) for part in parts}
    return shapes | ({FINAL_NORM.hf: shape(FINAL_NORM)} if final_norm else {})
