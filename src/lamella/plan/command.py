"""`lamella plan`: everything from reading the recipe to printing the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lamella.errors import UserError
from lamella.plan.compute import DEFAULT_GPU, gpu
from lamella.plan.fit import check_fit
from lamella.plan.layout import Layout
from lamella.plan.model import Model, read_model
from lamella.plan.report import plan_text, plan_values
from lamella.recipe import Recipe
from lamella.run_dir import write_atomic
from lamella.train.launch import arguments, prepare_recipe


def run(
    words: list[str],
    *,
    gpu_name: str = DEFAULT_GPU,
    ranks: int = 8,
    price_per_hour: float | None = None,
    tokens_per_second: float | None = None,
    dense: str | None = None,
    slices: int | None = None,
    json_path: Path | None = None,
) -> None:
    """Print the plan of a recipe, and write it where `json_path` says.

    Raises:
        UserError: a bad recipe, no config.json, ranks or degrees that do not fit, an unknown GPU.
    """
    recipe = prepare_recipe(*arguments(words))
    if (dense is None) != (slices is None):
        raise UserError("--dense and --slices belong together: a dense model, and how it would be converted")
    name = recipe.model if dense is None else dense
    model = read_model(name, slices)
    teacher = None
    if recipe.objective == "distil" and recipe.distil.teacher is not None:
        teacher = read_model(recipe.distil.teacher if dense is None else dense)
    layout = make_layout(recipe, model, ranks, gpu_name, teacher, name)
    values = plan_values(layout, gpu_name, price_per_hour, tokens_per_second)
    print(plan_text(values))
    if json_path is not None:
        write_atomic(json_path, json.dumps(values, indent=1) + "\n")


def make_layout(
    recipe: Recipe, model: Model, ranks: int, gpu_name: str, teacher: Model | None = None, name: str = "the model"
) -> Layout:
    """`gpu_name` "cpu" plans for ranks without GPUs. UserError where recipe, model and ranks do not go together."""
    if gpu_name != "cpu":
        gpu(gpu_name)
    if ranks < 1:
        raise UserError(f"ranks is {ranks}; it must be at least 1")
    recipe.check_world_size(ranks)
    check_fit(recipe, model, name)
    if recipe.lora is not None and model.moe is not None:
        model = replace(model, moe=model.moe.with_lora(recipe.lora.rank, recipe.lora.alpha))
    return Layout(model, recipe, ranks, "cpu" if gpu_name == "cpu" else "gpu", teacher)
