"""A conversion recipe: a YAML file and `key=value` words, checked. Imports no torch.

model: meta-llama/Meta-Llama-3-8B
method: partition
neurons: coadapted
active: 8
calibration: {data: python-docs, num_tokens: 65536}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lamella.errors import UserError
from lamella.recipe.check import Options, checked, refuse
from lamella.recipe.files import arguments, parse_yaml, read_recipe_text, set_by_word
from lamella.recipe.mergekit import BASE, as_recipe
from lamella.recipe.methods import method_named
from lamella.recipe.methods.common import MethodOptions


@dataclass(frozen=True)
class CommonKeys(Options):
    """The keys of a conversion recipe that do not depend on its method."""

    model: str | None = None
    """This model is converted: a folder, a .gguf file, a hub name or "embedded" for SmolLM2-135M, as null."""
    out: str | None = None
    """The converted model is written to this folder; null takes artifacts/moe."""
    method: str = "slice"
    """The conversion is by this method: slice, partition, upcycle, merge, adapters or attention; each has
    keys of its own."""


@dataclass(frozen=True)
class ConversionRecipe:
    """What a person said about a conversion, checked."""

    options: MethodOptions
    model: str | None = None
    out: str | None = None


def read_conversion(words: Sequence[str]) -> ConversionRecipe:
    """The recipe of a command's words: a YAML file, if one is named, the folder to be made, if one is named behind
    it, and `key=value`; else as `load_conversion`."""
    plain, settings = [word for word in words if "=" not in word], [word for word in words if "=" in word]
    if len(plain) == 2 and not plain[1].endswith((".yaml", ".yml")):
        recipe = load_conversion(plain[0], settings)
        if any(word.startswith("out=") for word in settings):
            raise UserError(f"the folder to be made is {plain[1]}, and out= names another; give one of them")
        return replace(recipe, out=plain[1])
    path, settings = arguments(words)
    return load_conversion(path, settings)


def load_conversion(path: str | Path | None, words: Sequence[str] = ()) -> ConversionRecipe:
    """The recipe in a YAML file with `key=value` words laid over it; UserError with all its problems at once."""
    values = {} if path is None else parse_yaml(read_recipe_text(Path(path)), str(path))
    for word in words:
        set_by_word(_spelled_out(values), word)
    return make_conversion(values)


def _spelled_out(values: dict[str, Any]) -> dict[str, Any]:
    """`calibration` may be its texts alone, and each of them its name alone."""
    if isinstance(texts := values.get("calibration"), str | Path | list):
        values["calibration"] = {"data": str(texts) if isinstance(texts, Path) else texts}
    section = values.get("calibration")
    if isinstance(section, dict) and isinstance(texts := section.get("data"), list | tuple):
        entries = [{"source": text} if isinstance(text, str) else text for text in texts]
        values["calibration"] = section | {"data": entries}
    return values


def make_conversion(values: dict[str, Any]) -> ConversionRecipe:
    """The recipe of plain values; UserError with all its problems at once."""
    values, lacking = as_recipe(values)
    names = [f.name for f in fields(CommonKeys)]
    own = {key: str(value) if isinstance(value, Path) else value for key, value in values.items() if key in names}
    rest = _spelled_out({key: value for key, value in values.items() if key not in names})
    if isinstance(rest.get("layers"), int | list | tuple):  # what YAML makes of 3 and of [0, 3]
        rest["layers"] = str(rest["layers"]).strip("[](),")
    common, lines = checked(CommonKeys, own)
    method = common.method if common is not None else str(own.get("method", "slice"))
    known = [*names, BASE] if method == "merge" else names
    options, more = checked(method_named(method).options, rest, known, f" of method {method!r}")
    refuse([*lacking, *lines, *more])
    assert common is not None
    assert options is not None
    return ConversionRecipe(options, common.model, common.out)
