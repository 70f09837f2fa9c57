"""What every recipe may say, read from the code: each key's type, its default, and the docstring below its field.

`lamella keys`, the commands' help and the reference of the documentation are made of this. Imports no torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from lamella.errors import check_choice
from lamella.recipe.adapters_training import METHOD as ADAPTERS
from lamella.recipe.adapters_training import AdaptersTraining
from lamella.recipe.check import fields_of, harmless_keys, sections_in
from lamella.recipe.conversion import CommonKeys
from lamella.recipe.methods import METHODS, method_named
from lamella.recipe.methods.common import FFNOptions
from lamella.recipe.stages import Stage
from lamella.recipe.training import Recipe

Kind = Literal["train", "convert"]


class Key(NamedTuple):
    """One key of a recipe."""

    name: str
    """A key in a section has dots, `guard.total`; one in the entries of a list has `[]`, `data[].weight`."""
    type: str
    """The type, as `int > 0`, `float | null`, `"auto" | "never"`, `section`, `list of sections`."""
    default: str
    """The default as YAML has it; empty for a key that must be given."""
    text: str
    """The docstring of the field, in one line."""
    harmless: bool = False
    """Whether a training run goes on when another value is given."""


def keys(kind: str, method: str | None = None) -> list[Key]:
    """All keys of a training recipe, of every conversion, or of one method's, in the order of the code.

    What several methods share comes last.

    Args:
        kind: "train" or "convert".
        method: of a conversion, or "adapters" of a training; None: the keys that do not depend on the method.

    Raises:
        UserError: a kind or a method that there is not.
    """
    check_choice("the kind of recipe", kind, get_args(Kind))
    if kind == "train" and method is not None:
        check_choice("the method of a training", method, (ADAPTERS,))
        return list(_keys(AdaptersTraining))
    if kind == "train":
        return [*_keys(Recipe), *_keys(Stage)]
    if method is None:
        return list(_keys(CommonKeys))
    shared = fields_of(FFNOptions)
    return sorted(_keys(method_named(method).options), key=lambda key: key.name in shared)


def describe(keys: list[Key], width: int = 80) -> str:
    """The keys as text of `width` columns: name, type and default, and below them what the key means."""
    blocks = []
    for key in keys:
        head = f"{key.name}: {key.type}" + (f", default {key.default}" if key.default else "")
        lines = textwrap.wrap(head, width, subsequent_indent=" " * 6)
        lines += textwrap.wrap(key.text, width, initial_indent=" " * 4, subsequent_indent=" " * 4)
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def overview() -> str:
    """The kinds of recipes and the methods, each with the command that lists its keys."""
    rows = [("lamella keys train", "The keys of a training recipe."), ("lamella keys convert", _first_line(CommonKeys))]
    rows += [(f"lamella keys convert {name}", _first_line(method.options)) for name, method in METHODS.items()]
    width = max(len(command) for command, _ in rows)
    indent = " " * (width + 2)
    return "\n".join(
        textwrap.fill(f"{command:<{width}}  {text}", 80, subsequent_indent=indent) for command, text in rows
    )


def _first_line(section: type[Any]) -> str:
    return (inspect.getdoc(section) or "").partition("\n")[0]


def _keys(section: type[Any], prefix: str = "") -> Iterator[Key]:
    harmless, texts = harmless_keys(section), docstrings(section)
    for name, hint in fields_of(section).items():
        field = section.model_fields[name] if issubclass(section, BaseModel) else None
        bounds = [] if field is None else field.metadata
        default = field_default(section, name)
        yield Key(prefix + name, _type(hint, bounds), default, texts.get(name, ""), name in harmless)
        dots = "[]." if _is_list(hint) else "."
        for nested in sections_in(hint):
            for key in _keys(nested, f"{prefix}{name}{dots}"):
                yield key._replace(harmless=name in harmless)


def docstrings(section: type[Any]) -> dict[str, str]:
    """Field -> the string literal below it, its line breaks taken out; those of base classes too."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        if not kind.__module__.startswith("lamella."):
            continue
        body = _class_body(kind)
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                match following:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        found[statement.target.id] = " ".join(text.split())
    return found


def _class_body(kind: type[Any]) -> list[ast.stmt]:
    for node in _module(inspect.getfile(kind)).body:
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            return node.body
    raise AssertionError(f"{kind} is not at the top of its module")


@cache
def _module(path: str) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def field_default(section: type[Any], name: str) -> str:
    """The default as YAML in one line; empty where there is none, or where it is a section's own."""
    value = _default(section, name)
    if value is PydanticUndefined or value is dataclasses.MISSING:
        return ""
    if isinstance(value, BaseModel) or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, list):
        value = [item.model_dump() if isinstance(item, BaseModel) else item for item in value]
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _default(section: type[Any], name: str) -> Any:
    if issubclass(section, BaseModel):
        field: FieldInfo = section.model_fields[name]
        return field.get_default(call_default_factory=True, validated_data={})
    found = next(f for f in dataclasses.fields(section) if f.name == name)
    return found.default if found.default_factory is dataclasses.MISSING else found.default_factory()


_BOUNDS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


def _type(hint: Any, bounds: list[Any]) -> str:
    limits = "".join(
        f" {sign} {getattr(bound, name)}"
        for bound in bounds
        for kind, (sign, name) in _BOUNDS.items()
        if isinstance(bound, kind)
    )
    return " | ".join(name + limits if name in ("int", "float") else name for name in _names(hint))


def _names(hint: Any) -> list[str]:
    """The branches of a type, by names that a person who writes YAML knows."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        inner = _names(parts[0])
        return [_type(parts[0], list(parts[1:]))] if inner in (["int"], ["float"]) else inner
    if origin is Literal:
        return [f'"{word}"' for word in parts]
    if origin is list:
        return ["list of sections" if sections_in(hint) else f"list of {' or '.join(_names(parts[0]))}"]
    if origin is dict:
        return ["section"]
    if parts:
        return [name for part in parts for name in _names(part)]
    if sections_in(hint):
        return ["section"]
    return ["null" if hint in (None, NoneType) else getattr(hint, "__name__", str(hint))]


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(_is_list(part) for part in get_args(hint))
