"""A config of mergekit-moe as a recipe of method "merge": the same keys, `base_model` in the place of `model`.

Without `method` the config is mergekit's own and means what it means there: gate_mode is `hidden` if it is not said,
and every expert names its model. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BASE = "base_model"
_LISTS = ("experts", "shared_experts")


def is_mergekit(values: Mapping[str, Any]) -> bool:
    """Whether the values are a config of mergekit-moe rather than a recipe that names its method."""
    return "method" not in values and (BASE in values or "experts" in values)


def as_recipe(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the keys of a recipe of ours, a line for each thing that mergekit's config lacks)."""
    recipe, lines = dict(values), []
    if is_mergekit(values):
        recipe = {key: value for key, value in recipe.items() if value is not None}
        recipe = {"method": "merge", "gate_mode": "hidden"} | recipe
        if not recipe.get(BASE) and not recipe.get("model"):
            lines.append("base_model is missing; name the model that gives everything but the experts")
        for name in _LISTS:
            lines += _nameless(name, recipe.get(name))
    if recipe.get("method") == "merge" and BASE in recipe:
        if recipe.get("model") is not None and not is_mergekit(values):
            lines.append("model and base_model both name the base model; give one of them")
        base = recipe.pop(BASE)
        recipe["model"] = recipe.get("model") or base
    return recipe, lines


def _nameless(name: str, experts: Any) -> list[str]:
    """Lines for the experts of a list that name no model."""
    if not isinstance(experts, list):
        return []
    return [
        f"{name}.{i}: source_model is missing"
        for i, expert in enumerate(experts)
        if isinstance(expert, dict) and not expert.get("source_model")
    ]
