"""What a config.json says of its model, dense or converted: one reading, for conversion, plans, both homes and exports.

Shapes: D model width, F dense FFN width, V vocabulary, N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lamella.architecture.not_held import NOT_HELD
from lamella.architecture.reading import Reading, read_meaning
from lamella.architecture.rows import CONVERTED_PREFIX, FAMILIES, names_of
from lamella.architecture.two_matrix import check_activation
from lamella.architecture.types import Family, Sizes
from lamella.errors import UserError, did_you_mean
from lamella.jsons import Json

# transformers' names (modeling_rope_utils); any other would be computed as something else or not at all.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_ROPE_NUMBERS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SLIDING = "sliding_attention"
_SAME_ACTIVATION = {"swish": "silu"}  # two names of one function in transformers
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "n_inner", "word_embed_proj_dim")
_MAX_LAYERS = 10_000  # a damaged number must not be counted up to


def sizes_of(config: Json) -> Sizes:
    """The reading of a config.json, of a dense model or a converted one.

    Raises:
        UserError: an unknown family, missing sizes, or fields that transformers itself does not accept.
    """
    name = str(config.get("model_type")).removeprefix(CONVERTED_PREFIX)
    family = known_family(name)
    _check_sizes(config, family)
    reading = read_meaning(config | {"model_type": name})
    if reading.model_type != name:
        raise UserError(
            f"transformers reads this {name} config as {reading.model_type!r}; write that as its model_type, and that "
            "family's class as its architecture, if it is one"
        )
    return _sizes(family, reading)


def trainable_sizes(config: Json) -> Sizes:
    """The reading of a config.json whose model the training home can express.

    Raises:
        UserError: a family or an activation that cannot be trained, or as `sizes_of`.
    """
    can = names_of(lambda family: family.trains)
    name = str(config.get("model_type")).removeprefix(CONVERTED_PREFIX)
    if name not in can:
        reason = f": {FAMILIES[name].not_trained}" if name in FAMILIES else did_you_mean(name, can)
        raise UserError(f"model_type {name!r} cannot be trained{reason}; {', '.join(can)} can")
    if config.get("adapters") is not None:
        raise UserError("adapters as experts are trained by `lamella adapters route`, not as this model")
    sizes = sizes_of(config)
    check_activation(sizes)
    return sizes


def known_family(name: str) -> Family:
    """The row of a model type; UserError for one that is unknown or not held."""
    if name in NOT_HELD:
        raise UserError(f"{name} models cannot be converted: {NOT_HELD[name]}")
    if name not in FAMILIES:
        hint = did_you_mean(name, FAMILIES)
        raise UserError(f"unknown architecture {name!r}{hint}; those that can be converted: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _sizes(family: Family, reading: Reading) -> Sizes:
    values = reading.values
    D, N, layers = values["hidden_size"], values["num_attention_heads"], values["num_hidden_layers"]
    H = values.get("head_dim") or D // N
    if not family.any_head_width and H != D // N:
        raise UserError(
            f"head_dim is {H}, but heads of {family.name} are hidden_size / num_attention_heads = {D // N} wide; take "
            "head_dim out of config.json"
        )
    G = values.get("num_key_value_heads", N)
    if G is None or G % family.kv_multiple:
        of_two = f", a multiple of {family.kv_multiple}" if family.kv_multiple > 1 else ""
        raise UserError(f"num_key_value_heads is {json.dumps(G)}; {family.name} needs a number of heads{of_two}")
    return Sizes(
        family=family,
        D=D,
        F=values[family.width] or 4 * D,
        num_layers=layers,
        N=N,
        G=G,
        H=H,
        V=values["vocab_size"],
        max_positions=values["max_position_embeddings"],
        tied=values["tie_word_embeddings"],
        activation=_SAME_ACTIVATION.get(values[family.activation], values[family.activation]),
        dtype=values["dtype"],
        rope=_rope(values, family),
        windows=_windows(values, layers),
        values=values,
    )


def _rope(values: Mapping[str, Any], family: Family) -> Mapping[str, Any] | None:
    rope = values.get("rope_parameters")
    if rope is None:
        return None
    if not isinstance(rope, dict):
        raise UserError(f"the rope parameters of config.json are {rope!r}, not an object; copy it again")
    if not family.ropes_by_kind:
        return _checked_rope(rope, family)
    return {kind: _checked_rope(own, family) for kind, own in rope.items() if own is not None}


def _checked_rope(rope: Any, family: Family) -> Mapping[str, Any]:
    if not isinstance(rope, dict):
        raise UserError(f"the rope parameters of a kind of layer are {rope!r}, not an object; copy config.json again")
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        hint = did_you_mean(str(rope_type), ROPE_TYPES)
        raise UserError(f"unknown rope type {rope_type!r}{hint}; known: {', '.join(ROPE_TYPES)}")
    for key in ("rope_theta", *(key for key in _ROPE_NUMBERS if rope.get(key) is not None)):
        if type(rope.get(key)) not in (int, float) or not 0 < rope[key] < math.inf:
            raise UserError(f"{key} of the rope is {rope.get(key)!r}; it must be a positive number")
    if rope_type != "default" and not family.scales_part and rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"rope type {rope_type!r} with partial_rotary_factor {rope['partial_rotary_factor']!r} is not computed by "
            "transformers for this family; take one of them out of config.json"
        )
    return rope


def _windows(values: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """The class has one window for all layers (Mistral), says each layer's kind (Qwen2), or has none (Llama)."""
    window, kinds = values.get("sliding_window"), values.get("layer_types")
    if window is not None and not _is_size(window):
        raise UserError(f"sliding_window is {window!r}; it must be a positive number of tokens, or null for none")
    if kinds is None:
        return (window,) * num_layers
    if unknown := sorted(set(kinds) - {SLIDING, "full_attention"}):
        raise UserError(f"layer_types names {', '.join(unknown)}; known are full_attention and {SLIDING}")
    # SmolLM3's masks have the window all the same, its attention has not
    if SLIDING in kinds and (window is None or values.get("use_sliding_window") is False):
        raise UserError(
            f"layer_types names {SLIDING}, but there is no window: give sliding_window and use_sliding_window true"
        )
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _check_sizes(config: Json, family: Family) -> None:
    wrong = [key for key in family.required if not _is_size(config.get(key))]
    wrong += [key for key in _OPTIONAL_SIZES if config.get(key) is not None and not _is_size(config[key])]
    if wrong:
        raise UserError(f"config.json lacks {', '.join(wrong)} (whole numbers); copy it again from the model's source")
    layers = max(config.get("num_hidden_layers") or 0, config.get("n_layer") or 0)
    if layers > _MAX_LAYERS:
        raise UserError(f"config.json says num_hidden_layers {layers}; at most {_MAX_LAYERS}")


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
