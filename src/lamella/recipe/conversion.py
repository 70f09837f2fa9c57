"""A conversion recipe: a YAML file and `key=value` words, checked. Keys are `model`, `out`, `method`, and the method's.

model: meta-llama/Meta-Llama-3-8B
method: partition
neurons: coadapted
active: 8
calibration: {data: python-docs, num_tokens: 16384}
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lamella.errors import UserError, did_you_mean
from lamella.recipe.files import parse_yaml, read_recipe_text, set_by_word
from lamella.recipe.methods.slice import Options

# method -> module and class of its options; the modules are imported when they are asked for
OPTIONS = {
    "slice": ("lamella.recipe.methods.slice", "SliceOptions"),
    "partition": ("lamella.recipe.methods.partition", "PartitionOptions"),
    "upcycle": ("lamella.recipe.methods.upcycle", "UpcycleOptions"),
    "attention": ("lamella.recipe.methods.attention", "AttentionOptions"),
}
_OWN_KEYS = ("model", "out", "method")


@dataclass(frozen=True)
class ConversionRecipe:
    options: Options
    model: str | None = None
    """Folder, .gguf file or hub name; None: the embedded model."""
    out: str | None = None


def load_conversion(path: str | Path | None, words: list[str] | tuple[str, ...] = ()) -> ConversionRecipe:
    """The recipe in a YAML file with `key=value` words laid over it; UserError with all its problems at once."""
    values = {} if path is None else parse_yaml(read_recipe_text(Path(path)), str(path))
    for word in words:
        set_by_word(_spelled_out(values), word)
    return make_conversion(values)


def _spelled_out(values: dict[str, Any]) -> dict[str, Any]:
    """`calibration` may be the text alone."""
    if isinstance(values.get("calibration"), str | Path):
        values["calibration"] = {"data": str(values["calibration"])}
    return values


def make_conversion(values: dict[str, Any]) -> ConversionRecipe:
    """Check plain values."""
    own = {key: values[key] for key in _OWN_KEYS if key in values}
    method = own.pop("method", "slice")
    if method not in OPTIONS:
        raise UserError(f"unknown method {method!r}{did_you_mean(str(method), OPTIONS)}; known: {', '.join(OPTIONS)}")
    wrong = [key for key, value in own.items() if not isinstance(value, str | Path | None)]
    if wrong:
        raise UserError(f"{wrong[0]} must be a path or a name, not {own[wrong[0]]!r}")
    kind = options_type(method)
    rest = _spelled_out({key: value for key, value in values.items() if key not in _OWN_KEYS})
    if isinstance(rest.get("layers"), int | list | tuple):  # what YAML makes of 3 and of [0, 3]
        rest["layers"] = str(rest["layers"]).strip("[](),")
    try:
        options = TypeAdapter(kind).validate_python(rest)
    except ValidationError as error:
        raise UserError("the recipe has errors:\n" + "\n".join(_lines(error, kind, method))) from None
    return ConversionRecipe(options, **{key: None if value is None else str(value) for key, value in own.items()})


def options_type(method: str) -> type[Any]:
    module, name = OPTIONS[method]
    return getattr(import_module(module), name)


def _lines(error: ValidationError, kind: type[Any], method: str) -> list[str]:
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        key = ".".join(where)
        if problem["type"] == "unexpected_keyword_argument":
            known = [*_known_keys(kind, where[:-1]), *(_OWN_KEYS if len(where) == 1 else ())]
            lines.append(f"  unknown key {key!r} of method {method!r}{did_you_mean(where[-1], known)}")
        elif key:
            lines.append(f"  {key}: {problem['msg'].removeprefix('Value error, ')}, not {problem['input']!r}")
        else:
            lines.append(f"  {problem['msg'].removeprefix('Value error, ')}")
    return lines


def _known_keys(kind: type[Any], parents: list[str]) -> list[str]:
    """Field names of the options, or of the section that `parents` lead to."""
    for parent in parents:
        hint = get_type_hints(kind).get(parent)
        kind = next((t for t in (hint, *getattr(hint, "__args__", ())) if hasattr(t, "__dataclass_fields__")), kind)
    return [f.name for f in fields(kind)]
