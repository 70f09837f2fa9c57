"""The model that a run begins with: a folder's, what an earlier run or stage makes of one, or the embedded model that
training converts where the default model is missing. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lamella.architecture.embedded import embedded_config
from lamella.plan.model import Model, make_model, read_model
from lamella.recipe.files import parse_yaml
from lamella.recipe.methods.common import MethodOptions
from lamella.recipe.methods.slice import SliceOptions
from lamella.recipe.result import CONFIG, MODEL, result_of
from lamella.recipe.training import Recipe, make_recipe

EMBEDDED = SliceOptions()
"""The conversion that training makes by itself."""


class Start(NamedTuple):
    model: Model
    name: str
    """What plans and errors call it."""


def starting_model(
    recipe: Recipe,
    earlier: Sequence[Recipe] = (),
    dense: str | None = None,
    options: MethodOptions | None = None,
) -> Start:
    """The model of a recipe.

    Args:
        earlier: the stages before it; its model is the last one's result.
        dense, options: a dense model and how it would be converted, in place of the first stage's model.

    Raises:
        UserError: no config.json, or see `read_model`.
    """
    if earlier and (dense is not None or not _has_config(recipe.model)):
        *before, last = earlier
        start = starting_model(last, before, dense, options)
        return start._replace(model=with_deltas(start.model, last))
    if dense is not None:
        done = "" if options is None else f" (converted by method {options.method})"
        return Start(read_model(dense, options), dense + done)
    if _has_config(recipe.model):
        return Start(read_model(recipe.model), recipe.model)
    return _not_made_yet(recipe.model)


def _not_made_yet(name: str) -> Start:
    """What training would make first."""
    result = result_of(Path(name))
    if result is not None and (config := result.out / CONFIG).is_file():
        recipe = make_recipe(parse_yaml(config.read_text(), str(config)))
        return Start(with_deltas(read_model(result.out / MODEL), recipe), name)
    if name == Recipe.model_fields["model"].default:
        model = make_model(embedded_config(), "the embedded model", EMBEDDED)
        return Start(
            model, f"{name}, not made yet: the embedded model in {EMBEDDED.slices} slices, as training makes it"
        )
    return Start(read_model(name), name)


def _has_config(folder: str) -> bool:
    return (Path(folder) / "config.json").is_file()


def with_deltas(model: Model, recipe: Recipe) -> Model:
    """The model with the low-rank deltas that the recipe adds; UserError where it has others."""
    if recipe.lora is None or model.moe is None:
        return model
    return replace(model, moe=model.moe.with_lora(recipe.lora.rank, recipe.lora.alpha))
