"""Family names and the names of MoE tensors stand in `architecture/` alone; the rest of the source derives from it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lamella
from lamella.architecture.moe_tensors import GATED_NAMES, KINDS, LORA, PARAMETERS, UP, UP_BIAS, WEIGHT, expert_name
from lamella.architecture.rows import CONVERTED_PREFIX, FAMILIES

SOURCE = Path(lamella.__file__).parent
# The stock model that experts are exported to is no family that is converted; its own names stand with its export.
OTHERS_NAMES = {"gate_proj", "up_proj", "down_proj"}
TENSORS = (
    set(GATED_NAMES)
    | {expert_name(kind, part) for kind in KINDS for part in (UP, UP_BIAS)}
    | {name for name in PARAMETERS if name != WEIGHT}
) - OTHERS_NAMES
# Fields of configs and of named tuples that are called like the tensor they decide on.
FIELDS = {"output_bias", "gate_scale", *LORA}
# llama.cpp calls kinds of tokenizers by the names of models.
TOKENIZERS = "export/gguf/tokenizer.py"
PIECES = re.compile(
    r"(frozen|trainable)_(gate_up|down|up)|experts\.(frozen|trainable|lora)_|router\.(weight|sel|gate|up)"
    r"|shared\.(gate_up|down|up)"
)


def strings() -> Iterator[tuple[str, str]]:
    """(place, text) of every string literal outside `architecture/` that is no docstring."""
    for path in SOURCE.rglob("*.py"):
        if "architecture" in path.relative_to(SOURCE).parts:
            continue
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node.value


def test_no_family_name_elsewhere() -> None:
    names = {*FAMILIES, *(CONVERTED_PREFIX + name for name in FAMILIES)}
    names |= {family.architecture for family in FAMILIES.values()}
    found = [(place, text) for place, text in strings() if text in names]
    assert not [(place, text) for place, text in found if not place.startswith(TOKENIZERS)]


def test_no_moe_tensor_name_elsewhere() -> None:
    found = [(place, text) for place, text in strings() if text in TENSORS - FIELDS or PIECES.search(text)]
    assert not found


def test_the_search_finds_what_it_looks_for() -> None:
    assert PIECES.search("experts.frozen_gate_up_proj")
    assert PIECES.search("model.layers.0.mlp.router.selection_bias")
    assert {"router.weight", "selection_bias", "frozen_down_proj"} <= TENSORS
