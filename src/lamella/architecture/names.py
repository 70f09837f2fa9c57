"""The one table of weight names: transformers (HF) <-> torchtitan. Weights themselves are laid out alike in both.

Torchtitan's own names for attention, norms and embeddings; ours for the experts. A tied `lm_head` has no entry of
its own in either home.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, TypeVar

from lamella.architecture.gated import EMBEDDING, FINAL_NORM, HEAD
from lamella.architecture.moe_tensors import (
    ATTENTION_IN_HF,
    ATTENTION_IN_TITAN,
    GATED_NAMES,
    MOE_IN_TITAN,
    OUTPUT_BIAS,
    ROUTED_ATTENTION_NAMES,
    is_frozen,
    is_lora,
    is_router,
)  # fmt: skip
from lamella.architecture.rows import FAMILIES
from lamella.errors import UserError

T = TypeVar("T")

# (HF, torchtitan); {} is the layer
NAMES: tuple[tuple[str, str], ...] = tuple(
    dict.fromkeys(
        [
            *((part.hf, part.titan) for part in (EMBEDDING, FINAL_NORM, HEAD)),
            *((part.hf, part.titan) for family in FAMILIES.values() if family.trains for part in family.layer),
            *((ATTENTION_IN_HF + name, ATTENTION_IN_TITAN + name) for name in ROUTED_ATTENTION_NAMES),
            *(
                (family.ffn.block + name, MOE_IN_TITAN + name)
                for family in FAMILIES.values()
                if family.trains
                for name in GATED_NAMES
            ),
        ]
    )
)
TITAN_LLAMA3: Literal["llama"] = "llama"
"""What torchtitan calls Llama 3.1's scaling of the rope."""
_TO_TITAN = dict(NAMES)
_TO_HF = {titan: hf for hf, titan in NAMES}
_ALWAYS_TRAINED = (".experts.trainable_", ".moe.shared.", f".moe.{OUTPUT_BIAS}")
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


def layer_number(name: str) -> int | None:
    """The layer that a parameter of this name belongs to; None: it is of none."""
    found = _LAYER.search(name)
    return None if found is None else int(found[0])


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
    if is_frozen(name) or trains == "nothing":
        return False
    if is_lora(name) or any(part in name for part in _ALWAYS_TRAINED):
        return True
    return trains == "all" or (trains == "experts+router" and is_router(name))


def stays_in_model(name: str, trains: str) -> bool:
    """Whether the parameter of this (torchtitan) name is, throughout a run, what the file of its model says.

    So is what does not train, but for routers, whose rows may be drawn or fitted when a run begins. Such weights are
    held in the file's precision and are not written into checkpoints.
    """
    return not is_trained(name, trains) and ".router." not in name


def _translate(name: str, table: dict[str, str]) -> str:
    layer = _LAYER.search(name)
    template = name if layer is None else f"{name[: layer.start()]}{{}}{name[layer.end() :]}"
    if template not in table:
        raise UserError(f"the tensor {name!r} has no place in this architecture; convert the model again")
    return table[template].format(layer and layer.group())
