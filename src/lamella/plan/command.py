"""`lamella plan`: everything from reading the recipe to printing the plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lamella.errors import UserError
from lamella.jsons import Json
from lamella.plan.choose import chosen
from lamella.plan.compute import DEFAULT_GPU, gpu
from lamella.plan.faults import STORAGE_RATE
from lamella.plan.fit import check_fit
from lamella.plan.layout import Layout
from lamella.plan.links import RANKS_PER_NODE
from lamella.plan.model import Model, read_model
from lamella.plan.report import plan_text, plan_values, suggestion_text
from lamella.plan.start import starting_model, with_deltas
from lamella.plan.suggest import suggest
from lamella.recipe.conversion import read_conversion
from lamella.recipe.files import arguments
from lamella.recipe.methods.common import MethodOptions
from lamella.recipe.stages import prepare_stages
from lamella.recipe.training import Recipe

DEFAULT_RANKS = 8


def run(
    words: list[str],
    *,
    gpu_name: str = DEFAULT_GPU,
    ranks: int | None = None,
    price_per_hour: float | None = None,
    tokens_per_second: float | None = None,
    dense: str | None = None,
    conversion: Sequence[str] = (),
    json_path: Path | None = None,
    per_node: int = RANKS_PER_NODE,
    storage_rate: float = STORAGE_RATE,
    suggests: bool = False,
) -> None:
    """Print the plan of a recipe, of several stages each, and write it where `json_path` says.

    Args:
        per_node, storage_rate: see `plan_values`.
        suggests: other layouts are compared, too.
        ranks: None: see `most_ranks`.
        dense: a dense model (or its config.json) in place of the recipe's, as if it had been converted.
        conversion: how: words as `lamella convert` takes them.

    Raises:
        UserError: a bad recipe, no config.json, ranks or degrees that do not fit, an unknown GPU.
    """
    if dense is None and conversion:
        raise UserError("--slices and --conversion say how a dense model would be converted: name it with --dense")
    if suggests and gpu_name == "cpu":
        raise UserError("--suggest compares layouts of GPUs; name one with --gpu")
    if per_node < 1 or storage_rate <= 0:
        raise UserError("--ranks-per-node and --storage-gb-per-second must be above 0")
    options = None if dense is None else read_conversion(conversion).options
    path, settings = arguments(words)
    recipes = prepare_stages(path, settings)
    every = prepare_stages(path, [word for word in settings if not word.startswith("stage=")])
    plans, texts = plan_stages(
        recipes, every, gpu_name, ranks, dense, options, price_per_hour=price_per_hour,
        tokens_per_second=tokens_per_second, per_node=per_node, storage_rate=storage_rate, suggests=suggests,
    )  # fmt: skip
    _give(plans, texts, json_path)


def plan_stages(
    recipes: Sequence[Recipe],
    every: Sequence[Recipe],
    gpu_name: str,
    ranks: int | None = None,
    dense: str | None = None,
    options: MethodOptions | None = None,
    *,
    price_per_hour: float | None = None,
    tokens_per_second: float | None = None,
    per_node: int = RANKS_PER_NODE,
    storage_rate: float = STORAGE_RATE,
    suggests: bool = False,
) -> tuple[dict[str, Json], dict[str, str]]:
    """(the plan as values, the plan as text) of each stage, by its name.

    Args:
        every: all stages of the recipe that `recipes` are of.
        options: how the model `dense` would be converted.
        per_node, storage_rate, suggests: as of `run`.

    Raises:
        UserError: as `run`.
    """
    ranks = most_ranks(recipes) if ranks is None else ranks
    plans, texts = {}, {}
    for recipe in recipes:
        start = starting_model(recipe, every[: every.index(recipe)], dense, options)
        layout = make_layout(recipe, start.model, ranks, gpu_name, _teacher(recipe, dense), start.name)
        values = plan_values(layout, gpu_name, price_per_hour, tokens_per_second, per_node, storage_rate)
        text = f"model             {start.name}\n{plan_text(values)}"
        if suggests:
            found = suggest(layout, gpu_name, per_node)
            values["suggestions"] = [suggestion.to_dict() for suggestion in found]
            text += f"\n{suggestion_text(found)}"
        stage = Path(recipe.out).name
        plans[stage], texts[stage] = values, text
    return plans, texts


def _give(plans: dict[str, Json], texts: dict[str, str], json_path: Path | None) -> None:
    """Print and write the plans of stages by their names, or of a run without."""
    if len(plans) == 1:
        (values,), (text,) = plans.values(), texts.values()
    else:
        values = {"stages": plans}
        text = "\n\n".join(f"stage             {stage}\n{text}" for stage, text in texts.items())
    print(text)
    if json_path is not None:
        json_path.write_text(json.dumps(values, indent=1) + "\n")


def most_ranks(recipes: Sequence[Recipe], limit: int = DEFAULT_RANKS) -> int:
    """The largest number of ranks up to `limit` that every recipe can be laid over; UserError where there is none."""
    suitable = [n for n in range(1, limit + 1) if all(_can_be_laid_over(n, recipe) for recipe in recipes)]
    if not suitable:
        for recipe in recipes:
            recipe.check_world_size(limit)  # raises for one of them
    return max(suitable)


def _can_be_laid_over(ranks: int, recipe: Recipe) -> bool:
    try:
        recipe.check_world_size(ranks)
    except UserError:
        return False
    return True


def _teacher(recipe: Recipe, dense: str | None) -> Model | None:
    """The teacher that is held beside the model, if there is one."""
    if recipe.objective != "distil" or recipe.distil.teacher is None:
        return None
    return read_model(recipe.distil.teacher if dense is None else dense)


def make_layout(
    recipe: Recipe, model: Model, ranks: int, gpu_name: str, teacher: Model | None = None, name: str = "the model"
) -> Layout:
    """`gpu_name` "cpu" plans for ranks without GPUs. UserError where recipe, model and ranks do not go together."""
    if gpu_name != "cpu":
        gpu(gpu_name)
    elif recipe.offload != "none":
        raise UserError(f"offload: {recipe.offload} moves a GPU's weights to main memory; name one with --gpu")
    if ranks < 1:
        raise UserError(f"ranks is {ranks}; it must be at least 1")
    recipe.check_world_size(ranks)
    check_fit(recipe, model, name)
    layout = Layout(with_deltas(model, recipe), recipe, ranks, "cpu" if gpu_name == "cpu" else "gpu", teacher)
    return chosen(layout, None if gpu_name == "cpu" else gpu(gpu_name)[1])
