"""A recipe of several stages: one run directory each, `out`/NAME, the next one's model the result of the one before.

    model: artifacts/moe
    out: artifacts/chat            # artifacts/chat/heal, artifacts/chat/sft
    seq_len: 2048                  # what all stages share
    stages:
      - {name: heal, objective: distil, data: [python-docs], steps: 100}
      - {name: sft, objective: sft, data: [chat.jsonl], steps: 300, lr: 1.0e-5}

A stage's settings replace the common ones whole, sections too. Imports no torch.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from lamella.errors import UserError, did_you_mean
from lamella.installation import LAUNCH
from lamella.recipe.check import Strict
from lamella.recipe.files import parse_yaml, read_recipe_text, set_by_word
from lamella.recipe.result import result_folder
from lamella.recipe.training import Recipe, make_recipe

DEMO_RECIPE = LAUNCH / "recipes" / "demo.yaml"
# One value for the whole recipe: a stage has its place and its model from the order of the stages.
WHOLE = ("model", "out")


class Stage(Strict):
    """What a recipe of several stages has besides the keys of one run."""

    stages: list[dict[str, Any]] = Field(default=[])
    """The run is trained in these stages, one after another, each a section with a `name` and the keys that differ
    there; `stage=NAME` on the command line selects one."""


def make_stages(values: dict[str, Any], words: Sequence[str] = ()) -> list[Recipe]:
    """The recipe of each stage, in order; a recipe without `stages` is its own only one.

    Args:
        values: of the recipe's file.
        words: `key=value` sets it in every stage, `stages.NAME.key=value` in one; `stage=NAME` selects that one.

    Raises:
        UserError: all problems of all stages at once.
    """
    selected, words = _selected(words)
    if "stages" not in values:
        if selected is not None:
            raise UserError(f"stage={selected} selects a stage, but the recipe has no stages")
        return [_with_words(values, words)]
    common = {key: value for key, value in values.items() if key != "stages"}
    for word in words:
        if not word.startswith("stages."):
            set_by_word(common, word)
    named = _named(values["stages"], words)
    recipes: dict[str, Recipe] = {}
    problems: list[str] = []
    base = Path(str(common.get("out") or Recipe.model_fields["out"].default))
    model = common.get("model", Recipe.model_fields["model"].default)
    for name, own in named.items():
        try:
            places = {"model": model, "out": str(base / name)}
            if common.get("checkpoint_folder") and "checkpoint_folder" not in own:
                places["checkpoint_folder"] = posixpath.join(str(common["checkpoint_folder"]), name)
            recipes[name] = make_recipe(common | own | places)
            if recipes[name].on_exhausted == "stop" and name != list(named)[-1]:
                problems.append(f"stage {name!r}: on_exhausted: stop is for the last stage; a next one needs all steps")
            model = str(result_folder(base / name, recipes[name].steps))
        except UserError as error:
            problems.append(str(error).replace("the recipe has errors", f"stage {name!r} has errors", 1))
    if problems:
        raise UserError("\n".join(problems))
    if selected is None:
        return list(recipes.values())
    if selected not in recipes:
        raise UserError(
            f"the recipe has no stage {selected!r}{did_you_mean(selected, recipes)}; it has {', '.join(recipes)}"
        )
    return [recipes[selected]]


def _selected(words: Sequence[str]) -> tuple[str | None, list[str]]:
    names = [word.partition("=")[2] for word in words if word.startswith("stage=")]
    return (names[-1] if names else None), [word for word in words if not word.startswith("stage=")]


def _with_words(values: dict[str, Any], words: Sequence[str]) -> Recipe:
    for word in words:
        if word.startswith("stages."):
            raise UserError(f"{word!r} is a setting of a stage, but the recipe has no stages")
        set_by_word(values, word)
    return make_recipe(values)


def _named(stages: Any, words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The stages' own settings by their names, with the words laid over them; UserError for no such list."""
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise UserError("stages must be a list of at least one section {name, objective, ...}")
    named: dict[str, dict[str, Any]] = {}
    problems = []
    for number, stage in enumerate(stages, 1):
        name = stage.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            problems.append(f"  stage {number}: name is {name!r}; it must be letters, digits, - and _, for a folder")
        elif name in named:
            problems.append(f"  stage {number}: there is a stage {name!r} already")
        else:
            named[name] = {key: value for key, value in stage.items() if key != "name"}
            problems += [f"  stage {name!r}: {key} is set for the whole recipe only" for key in WHOLE if key in stage]
            if "stages" in stage:
                problems.append(f"  stage {name!r}: a stage has no stages")
    if problems:
        raise UserError("the recipe's stages have errors:\n" + "\n".join(problems))
    for word in words:
        _lay_over(named, word)
    return named


def _lay_over(named: dict[str, dict[str, Any]], word: str) -> None:
    """A word over the stages: over the one it names, or over those that have a value of their own for its key."""
    if not word.startswith("stages."):
        key = word.partition("=")[0].split(".")[0]
        for own in named.values():
            if key in own:
                set_by_word(own, word)
        return
    name, _, setting = word.removeprefix("stages.").partition(".")
    if name not in named or not setting:
        raise UserError(
            f"{word!r}: write stages.NAME.key=value, with NAME one of {', '.join(named)}{did_you_mean(name, named)}"
        )
    if setting.partition("=")[0].split(".")[0] in (*WHOLE, "name", "stages"):
        raise UserError(f"{word!r}: {', '.join(WHOLE)} and the stages' names are set for the whole recipe only")
    set_by_word(named[name], setting)


def prepare_stages(path: str | None, settings: Sequence[str]) -> list[Recipe]:
    """The stages (mostly one) of a recipe file with the settings laid over it; without a file, of the demo recipe."""
    chosen = DEMO_RECIPE if path is None else Path(path)
    return make_stages(parse_yaml(read_recipe_text(chosen), str(chosen)), settings)


def prepare_recipe(path: str | None, settings: Sequence[str]) -> Recipe:
    """The recipe of one run; UserError where there are several stages and none is selected."""
    stages = prepare_stages(path, settings)
    if len(stages) > 1:
        names = ", ".join(Path(stage.out).name for stage in stages)
        raise UserError(f"the recipe has the stages {names}: select one with stage=NAME")
    return stages[0]
