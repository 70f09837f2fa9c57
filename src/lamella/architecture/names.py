"""The one table of weight names: transformers (HF) <-> torchtitan. Weights themselves are laid out alike in both.

Torchtitan's own names for attention, norms and embeddings; ours for the experts. A tied `lm_head` has no entry of
its own in either home.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from lamella.errors import UserError

T = TypeVar("T")

# (HF, torchtitan); {} is the layer
NAMES: tuple[tuple[str, str], ...] = (
    ("model.embed_tokens.weight", "tok_embeddings.weight"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
    ("model.layers.{}.input_layernorm.weight", "layers.{}.attention_norm.weight"),
    ("model.layers.{}.post_attention_layernorm.weight", "layers.{}.ffn_norm.weight"),
    ("model.layers.{}.self_attn.q_norm.weight", "layers.{}.attention.q_norm.weight"),
    ("model.layers.{}.self_attn.k_norm.weight", "layers.{}.attention.k_norm.weight"),
    *(
        (f"model.layers.{{}}.{hf}.{kind}", f"layers.{{}}.{titan}.{kind}")
        for hf, titan in (
            ("self_attn.q_proj", "attention.qkv_linear.wq"),
            ("self_attn.k_proj", "attention.qkv_linear.wk"),
            ("self_attn.v_proj", "attention.qkv_linear.wv"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"),
            ("mlp.down_proj", "feed_forward.w2"),
        )
        for kind in ("weight", "bias")
    ),
    *(
        (f"model.layers.{{}}.self_attn.router.{name}", f"layers.{{}}.attention.heads.router.{name}")
        for name in ("weight", "gate_scale", "selection_bias")
    ),
    *(
        (f"model.layers.{{}}.mlp.{name}", f"layers.{{}}.moe.{name}")
        for name in (
            "router.weight",
            "router.up_weight",
            "router.gate_scale",
            "router.selection_bias",
            "shared.gate_up_proj",
            "shared.down_proj",
            "output_bias",
            "experts.frozen_gate_up_proj",
            "experts.frozen_down_proj",
            "experts.trainable_gate_up_proj",
            "experts.trainable_down_proj",
            "experts.lora_gate_up_a",
            "experts.lora_gate_up_b",
            "experts.lora_down_a",
            "experts.lora_down_b",
        )
    ),
)
_TO_TITAN = dict(NAMES)
_TO_HF = {titan: hf for hf, titan in NAMES}
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def titan_name(hf_name: str) -> str:
    """'model.layers.3.mlp.router.weight' -> 'layers.3.moe.router.weight'; UserError for a name without a place."""
    return _translate(hf_name, _TO_TITAN)


def hf_name(titan_name: str) -> str:
    """The inverse of `titan_name`."""
    return _translate(titan_name, _TO_HF)


def from_hf(state: Mapping[str, T]) -> dict[str, T]:
    return {titan_name(name): value for name, value in state.items()}


def to_hf(state: Mapping[str, T]) -> dict[str, T]:
    return {hf_name(name): value for name, value in state.items()}


def is_trained(name: str, trains: str) -> bool:
    """Whether the parameter of this (torchtitan) name trains; frozen experts never do, nor does a teacher."""
    if ".experts.frozen_" in name or trains == "nothing":
        return False
    if any(part in name for part in (".experts.trainable_", ".experts.lora_", ".moe.shared.", ".moe.output_bias")):
        return True
    return trains == "all" or (trains == "experts+router" and ".router." in name)


def _translate(name: str, table: dict[str, str]) -> str:
    layer = _LAYER.search(name)
    template = name if layer is None else f"{name[: layer.start()]}{{}}{name[layer.end() :]}"
    if template not in table:
        raise UserError(f"the tensor {name!r} has no place in this architecture; convert the model again")
    return table[template].format(layer and layer.group())
