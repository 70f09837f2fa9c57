"""Layouts of a recipe over its ranks, compared: which fit into a GPU, and which of these is the fastest by roofline.

Compared are degrees of parallelism, what is computed again in the backward pass, and whether each rank holds all that
does not train. Frozen experts wait in main memory in layouts that do not fit otherwise; all weights do where no layout
fits otherwise. Selective checkpointing is left out: no figure stands behind its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from lamella.errors import UserError
from lamella.plan.compute import gpu
from lamella.plan.fit import check_fit
from lamella.plan.layout import Layout
from lamella.plan.memory import fullest
from lamella.plan.roofline import Roofline, roofline
from lamella.recipe.parallel import Parallel
from lamella.recipe.training import Recipe

GPU_RESERVE_BYTES = 4e9
"""This much of a GPU is left free for what is not counted: context, communication buffers, holes between blocks. Not
measured."""
DEGREES = (1, 2, 4, 8, 16)
SHOWN = 5


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits."""

    settings: dict[str, Any]
    """Keys of the recipe that differ from their defaults or from the recipe, as words of a command have them."""
    peak_bytes: int
    main_memory_bytes: int
    """What waits there of a rank's."""
    roofline: Roofline

    def words(self) -> str:
        """For a command line."""
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        moved = self.roofline.traffic.all
        return {
            "settings": self.settings, "peak_bytes": self.peak_bytes, "main_memory_bytes": self.main_memory_bytes,
            "step_s": self.roofline.step_s, "roofline_mfu": self.roofline.mfu,
            "bytes_inside_of_a_node": round(moved.inside), "bytes_over_the_network": round(moved.network),
        }  # fmt: skip


def suggest(layout: Layout, gpu_name: str, per_node: int) -> list[Suggestion]:
    """The fastest layouts that fit, the best first; of equals the simplest. Empty where none fits.

    Steps, samples and all else that changes the result stay the recipe's.
    """
    room, variants = gpu(gpu_name)[1] - GPU_RESERVE_BYTES, list(_variants(layout, per_node))
    fitting = [_fitting(variant, room, ("none", "frozen")) for variant in variants]
    if not any(fitting):
        fitting = [_fitting(variant, room, ("cpu",)) for variant in variants]
    found = [_suggestion(variant, layout.recipe, gpu_name, per_node) for variant in fitting if variant is not None]
    return sorted(found, key=lambda s: (round(s.roofline.step_s, 3), len(s.settings), s.peak_bytes))[:SHOWN]


def _fitting(layout: Layout, room: float, offloads: Sequence[str]) -> Layout | None:
    """The layout with the first of these kinds of offload that lets it fit into `room` bytes of a GPU."""
    for offload in offloads:
        variant = replace(layout, recipe=layout.recipe.model_copy(update={"offload": offload}))
        impossible = offload != "none" and layout.recipe.frozen_weights == "replicated"
        if not impossible and _is_possible(variant) and fullest(variant).peak().total_bytes <= room:
            return variant
    return None


def _suggestion(layout: Layout, given: Recipe, gpu_name: str, per_node: int) -> Suggestion:
    memory = fullest(layout)
    waiting = sum(memory.main_memory().values())
    best = roofline(layout, gpu_name, per_node)
    return Suggestion(_settings(layout, given), memory.peak().total_bytes, waiting, best)


def _variants(layout: Layout, per_node: int) -> Iterator[Layout]:
    nodes = max(1, layout.num_ranks // per_node)
    copies = [n for n in range(1, nodes + 1) if nodes % n == 0]
    others = [("context", n) for n in DEGREES[1:4]] + [("tensor", n) for n in DEGREES[1:4] if n <= per_node]
    others += [("pipeline", n) for n in DEGREES[1:]]
    for replicate, expert, (kind, degree) in product(copies, DEGREES, [("context", 1), *others]):
        degrees = {"replicate": replicate, "expert": expert, kind: degree}
        for again, frozen in product(("none", "full"), ("sharded", "replicated") if nodes > 1 else ("sharded",)):
            update = {"activation_checkpointing": again, "frozen_weights": frozen, "parallel": Parallel(**degrees)}
            if frozen == "sharded" or degree == 1:
                yield replace(layout, recipe=layout.recipe.model_copy(update=update))


def _is_possible(layout: Layout) -> bool:
    recipe = layout.recipe
    if recipe.parallel.problems(recipe.seq_len):
        return False
    try:
        recipe.check_world_size(layout.num_ranks)
        check_fit(recipe, layout.model, "the model")
    except UserError:
        return False
    return not (recipe.parallel.expert > 1 and layout.shards * recipe.parallel.tensor % recipe.parallel.expert)


def _settings(layout: Layout, given: Recipe) -> dict[str, Any]:
    recipe = layout.recipe
    degrees = {f"parallel.{k}": v for k, v in recipe.parallel.model_dump().items() if v > 1}
    found = degrees | {"activation_checkpointing": recipe.activation_checkpointing}
    if recipe.offload != "none" or given.offload != "none":
        found["offload"] = recipe.offload
    if "replicated" in (recipe.frozen_weights, given.frozen_weights):
        found["frozen_weights"] = recipe.frozen_weights
    return found


def even_layout(layout: Layout) -> str | None:
    """Words that let ranks share out the experts evenly, where those of the recipe do not; None where there are none.

    More copies of the model (`replicate`) are cut over fewer ranks each; the most ranks that come out even are taken.
    """
    parallel = layout.recipe.parallel
    room = layout.num_ranks // (parallel.tensor * parallel.pipeline)
    for replicate in range(parallel.replicate + 1, room + 1):
        if room % replicate:
            continue
        degrees = parallel.model_copy(update={"replicate": replicate})
        variant = replace(layout, recipe=layout.recipe.model_copy(update={"parallel": degrees}))
        if _is_possible(variant) and variant.shards > 1 and not cuts_unevenly(variant):
            return f"parallel.replicate={replicate}"
    return None


def cuts_unevenly(layout: Layout) -> bool:
    """Whether some ranks hold less of an expert tensor than others; of its rows, one more or less is nothing."""
    ranks = layout.shards * layout.recipe.parallel.tensor
    experts = [w for w in layout.model.weights() if w.is_expert]
    return any(layout.shard_numel(w) * ranks > 1.02 * w.numel and not layout.is_whole(w) for w in experts)
