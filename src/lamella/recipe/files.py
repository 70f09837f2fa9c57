"""Recipes as people write them: a YAML file, and `key=value` words laid over it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lamella.errors import UserError
from lamella.installation import command, find_file

MAX_DEPTH = 50
MAX_RECIPE_BYTES = 1_000_000


def arguments(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """[RECIPE.yaml] [key=value ...] -> (the recipe's path or None, the settings)."""
    recipes = [w for w in words if "=" not in w]
    if len(recipes) > 1:
        raise UserError(f"give one recipe, not {', '.join(recipes)}; settings are written key=value")
    return (recipes[0] if recipes else None), [w for w in words if "=" in w]


def read_recipe_text(path: Path) -> str:
    """The text of a file, or of the recipe that lamella ships under that name (`launch/recipes/demo.yaml`).

    Raises:
        UserError: there is none, or too much, or no UTF-8.
    """
    path = find_file(path)
    if not path.is_file():
        raise UserError(f"there is no recipe {path}; `{command('lamella recipes')}` lists those that lamella brings")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"{path} is larger than {MAX_RECIPE_BYTES} bytes; is it a recipe?")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _events(text: str) -> Iterator[yaml.Event]:
    """What the parser finds; ValueError where it is nested so deeply that reading it would take minutes."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels inside of each other")
        yield event


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """A YAML mapping without aliases (small files of them grow without bound) and without Python objects."""
    try:
        has_alias = any(isinstance(event, yaml.AliasEvent) for event in _events(text))
        values = None if has_alias else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise UserError(f"{name} is not valid YAML: {error}") from None
    if has_alias:
        raise UserError(f"{name} uses YAML aliases (*name); write the value out")
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{name} must be a mapping of keys to values")
    return values


def set_by_word(values: dict[str, Any], word: str) -> None:
    """Lay 'a.b=value' over nested values; the value is read as YAML."""
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise UserError(f"{word!r} is no setting; write key=value, or give one recipe file")
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    try:
        values[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that there is not
        raise UserError(f"the value of {key} is not valid YAML: {error}") from None
