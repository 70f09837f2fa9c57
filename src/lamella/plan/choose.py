"""What a recipe leaves to the plan: which activations are computed again, and how often gradients are summed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lamella.plan.layout import Layout
from lamella.plan.links import RANKS_PER_NODE
from lamella.plan.memory import fullest
from lamella.plan.suggest import GPU_RESERVE_BYTES
from lamella.recipe.training import Recipe


def chosen(layout: Layout, device_bytes: float | None, ranks_per_node: int = RANKS_PER_NODE) -> Layout:
    """The layout without an `auto` that memory decides: the cheapest that fits, or what needs least. Inside a node
    gradients are summed while the next layer computes; between nodes the network is slower.

    Args:
        device_bytes: the memory of a GPU; None for ranks without GPUs, which keep all activations.
    """
    candidates = list(_candidates(layout.recipe, layout.num_ranks > ranks_per_node, device_bytes is not None))
    for recipe in candidates[:-1]:
        candidate = replace(layout, recipe=recipe)
        if device_bytes is None or fullest(candidate).peak().total_bytes + GPU_RESERVE_BYTES <= device_bytes:
            return candidate
    return replace(layout, recipe=candidates[-1])


def _candidates(recipe: Recipe, several_nodes: bool, on_gpu: bool) -> Iterator[Recipe]:
    """From the fastest on. To compute activations again costs up to a quarter of a step, and comes last."""
    kinds = ("none", "selective", "full") if on_gpu else ("none",)
    syncs = ("step", "micro_batch") if on_gpu and several_nodes else ("micro_batch",)
    for kind in kinds if recipe.activation_checkpointing == "auto" else (recipe.activation_checkpointing,):
        for sync in syncs if recipe.gradient_sync == "auto" else (recipe.gradient_sync,):
            yield recipe.model_copy(update={"activation_checkpointing": kind, "gradient_sync": sync})
