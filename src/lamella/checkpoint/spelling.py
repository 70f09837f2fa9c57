"""One config.json that old and new readers take for the same model.

transformers 5 keeps theta and scaling of the rotary embedding in `rope_parameters`; transformers 4, vLLM and SGLang
read `rope_theta` and `rope_scaling`, and fall back to theta 10000 where these are missing, without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lamella.jsons import Json

# Beside `rope_scaling` in the older spelling, not in it.
_OUTSIDE_SCALING = ("rope_theta", "partial_rotary_factor")


def both_spellings(config: Json) -> Json:
    """The same config with rope and dtype spelt for both; as it is where it has neither.

    What a missing or older key means is taken from transformers' own config object.
    """
    config = dict(config)
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        config |= {"dtype": dtype, "torch_dtype": dtype}
    rope = standard_rope(config)
    return config if rope is None else config | spelt_rope(rope)


def spelt_rope(rope: Json) -> Json:
    """The keys of config.json that say `rope`, every number of its type given, to old and new readers."""
    scaling = {key: value for key, value in rope.items() if key not in _OUTSIDE_SCALING}
    older = {key: rope[key] for key in _OUTSIDE_SCALING if key in rope}
    older["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if rope["rope_type"] == "longrope":  # transformers 4 reads it there alone, and else the longer new maximum
        older["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return {"rope_parameters": rope} | older


def standard_rope(config: Json) -> Json | None:
    """`rope_parameters` of transformers' config object, with every number that older readers need.

    None for a model without one, or with one per kind of layer.
    """
    from transformers import AutoConfig

    values = copy.deepcopy(config)  # transformers writes into the dicts that it is given
    parsed = AutoConfig.for_model(values.pop("model_type"), **values)
    rope = getattr(parsed, "rope_parameters", None)
    if not rope or "rope_type" not in rope:
        return None
    return completed(rope, parsed.max_position_embeddings)


def completed(rope: Mapping[str, Any], max_positions: int) -> Json:
    """`rope_parameters` without what is not set, with the factor that older readers do not compute themselves."""
    rope = {key: value for key, value in rope.items() if value is not None and key != "type"}
    if rope["rope_type"] in ("yarn", "longrope") and "factor" not in rope:
        rope["factor"] = max_positions / rope["original_max_position_embeddings"]
    return rope
