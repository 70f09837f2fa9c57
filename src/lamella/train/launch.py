"""The way to a training run that needs no torch: arguments, recipe, and the call of torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from lamella.errors import UserError
from lamella.recipe import Recipe, load_recipe, make_recipe, set_by_word


def arguments(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """[RECIPE.yaml] [key=value ...] -> (the recipe's path or None, the settings)."""
    recipes = [w for w in words if "=" not in w]
    if len(recipes) > 1:
        raise UserError(f"give one recipe, not {', '.join(recipes)}; settings are written key=value")
    return (recipes[0] if recipes else None), [w for w in words if "=" in w]


def prepare_recipe(path: str | None, settings: Sequence[str]) -> Recipe:
    """The recipe file with the settings laid over it; without a file, the embedded demo recipe."""
    if path is not None:
        return load_recipe(path, list(settings))
    values = yaml.safe_load(files("lamella.train").joinpath("demo.yaml").read_text())
    for word in settings:
        set_by_word(values, word)
    return make_recipe(values)


def default_threads() -> int:
    """This machine's cores, shared among its ranks."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def torchrun_command(nproc: int, words: Sequence[str]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [*torchrun, "-m", "lamella.train.worker", *words]


def launch(words: Sequence[str], nproc: int, quiet: bool = False) -> int:
    """Check the recipe, then train with `nproc` ranks on this machine; torchrun's exit code.

    Raises:
        UserError: the recipe has errors, or cannot be shared among the ranks; nothing was started.
    """
    recipe = prepare_recipe(*arguments(words))
    if nproc < 1:
        raise UserError(f"nproc is {nproc}; it must be at least 1")
    recipe.check_world_size(nproc)
    _check_model(recipe)
    threads = recipe.threads_per_rank or max(1, len(os.sched_getaffinity(0)) // nproc)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(torchrun_command(nproc, words), env=environment, stdout=output, check=False).returncode


def _check_model(recipe: Recipe) -> None:
    default = Recipe.model_fields["model"].default
    if recipe.model != default and not (Path(recipe.model) / "config.json").is_file():
        raise UserError(
            f"there is no model {recipe.model}; make it with `uv run convert_by_slicing.py --out {recipe.model}`"
        )
