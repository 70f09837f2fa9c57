"""`lamella plan`: everything from reading the recipe to printing the plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lamella.errors import UserError
from lamella.plan.compute import DEFAULT_GPU, gpu
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
    model = read_model(recipe.model if dense is None else dense, slices)
    teacher = None
    if recipe.objective == "distil" and recipe.distil.teacher is not None:
        teacher = read_model(recipe.distil.teacher if dense is None else dense)
    layout = make_layout(recipe, model, ranks, gpu_name, teacher)
    values = plan_values(layout, gpu_name, price_per_hour, tokens_per_second)
    print(plan_text(values))
    if json_path is not None:
        write_atomic(json_path, json.dumps(values, indent=1) + "\n")


def make_layout(recipe: Recipe, model: Model, ranks: int, gpu_name: str, teacher: Model | None = None) -> Layout:
    """`gpu_name` "cpu" plans for ranks without GPUs. UserError where recipe, model and ranks do not go together."""
    if gpu_name != "cpu":
        gpu(gpu_name)
    if ranks < 1:
        raise UserError(f"ranks is {ranks}; it must be at least 1")
    recipe.check_world_size(ranks)
    recipe.parallel.check_stages("the model", model.num_layers, model.tied)
    if recipe.parallel.pipeline > 1 and recipe.objective == "distil":
        raise UserError("parallel.pipeline has no way for a teacher; set objective: pretrain, or pipeline to 1")
    if recipe.seq_len > model.max_positions:
        raise UserError(f"seq_len {recipe.seq_len} is longer than the model's {model.max_positions} positions")
    if model.moe is None and recipe.trains != "all":
        if model.attention_moe is None:
            raise UserError("a dense model has no experts to train; plan it with --slices, or set trains: all")
        if recipe.trains == "experts":
            raise UserError("of experts in attention alone only routers train; set trains: experts+router, or all")
    if recipe.lora is not None:
        if model.moe is None:
            raise UserError("lora adds to frozen experts, and a dense model has none; plan it with --slices")
        model = replace(model, moe=model.moe.with_lora(recipe.lora.rank, recipe.lora.alpha))
    for layer in range(model.num_layers):
        moe, degree = model.moe_of(layer), recipe.parallel.expert
        if moe is not None and (moe.num_frozen_experts % degree or moe.num_trainable_experts % degree):
            raise UserError(f"parallel.expert={degree} does not divide the experts of layer {layer}; choose a divisor")
    return Layout(model, recipe, ranks, "cpu" if gpu_name == "cpu" else "gpu", teacher)
