"""The one strict checker of what people write: unknown keys are named, and all problems are told at once.

It takes a kind of section, a pydantic model or a dataclass of `Options`, and plain values. Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lamella.errors import UserError, check_choice, did_you_mean

T = TypeVar("T")
_HARMLESS = "another value of this key makes no other run"
Harmless = Annotated[T, _HARMLESS]
"""`key: Harmless[int]`: the key changes what is kept and shown, or where it is computed, but not what is computed."""
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


class Problems(UserError):
    """Several things that are wrong with one section; a line each where a recipe is checked."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = list(lines)


class Strict(BaseModel):
    """A section of a recipe that refuses keys it does not know, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Options:
    """A section of a recipe that Python code makes, too, with the same errors: its fields are the recipe's keys."""

    # read by pydantic where a recipe is checked
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __post_init__(self) -> None:
        if found := [*self._wrong_choices(), *self.problems()]:
            raise Problems(found)

    def problems(self) -> list[str]:
        """What is impossible about the values, alone and together."""
        return []

    def _wrong_choices(self) -> list[str]:
        found = []
        for name, hint in fields_of(type(self)).items():
            choices = _choices(hint)
            if choices and isinstance(value := getattr(self, name), str | None):
                try:
                    check_choice(name, value, choices)
                except UserError as error:
                    found.append(str(error))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, nested ones too."""
        return dataclasses.asdict(self)


def _choices(hint: Any) -> list[str | None]:
    """The words that a type allows, and None where it may be left out; none where it allows any text."""
    parts = get_args(hint) if get_origin(hint) is not Literal and type(None) in get_args(hint) else (hint,)
    if str in parts:
        return []
    words = [word for part in parts if get_origin(part) is Literal for word in get_args(part)]
    return [*words, None] if words and type(None) in parts else words


def checked(
    kind: type[T], values: Mapping[str, Any], also_known: Iterable[str] = (), where: str = ""
) -> tuple[T | None, list[str]]:
    """(the section of these values or None, a line for each problem).

    Args:
        also_known: further keys that a typing mistake may have meant.
        where: follows an unknown key's name: " of method 'slice'".
    """
    lines = _flags(kind, values)
    try:
        made = TypeAdapter(kind).validate_python(dict(values))
    except ValidationError as error:
        return None, lines + _lines(error, kind, also_known, where)
    return (None, lines) if lines else (made, [])


def refuse(lines: Sequence[str], what: str = "the recipe") -> None:
    """UserError with all the lines, if there are any."""
    if lines:
        raise UserError(f"{what} has errors:\n" + "\n".join(f"  {line}" for line in lines))


def fields_of(kind: type[Any]) -> dict[str, Any]:
    """Name -> type hint of a section's keys."""
    hints = get_type_hints(kind, include_extras=True)
    names = kind.model_fields if issubclass(kind, BaseModel) else [f.name for f in dataclasses.fields(kind)]
    return {name: hints[name] for name in names}


def sections_in(hint: Any) -> list[type[Any]]:
    """The kinds of sections that a value of this type may hold."""
    if isinstance(hint, type) and (dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel)):
        return [hint]
    return [kind for part in get_args(hint) for kind in sections_in(part)]


def harmless_keys(kind: type[Any]) -> frozenset[str]:
    """The keys marked `Harmless`."""
    return frozenset(name for name, hint in fields_of(kind).items() if _HARMLESS in getattr(hint, "__metadata__", ()))


def _flags(kind: type[Any], values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines for yes and no in the place of numbers, which pydantic would take as 1 and 0."""
    lines: list[str] = []
    for name, hint in fields_of(kind).items():
        value = values.get(name)
        types = _types(hint)
        if isinstance(value, bool) and types & {int, float} and not types & {bool, Any}:
            lines.append(f"{prefix}{name}: it is a number, not {str(value).lower()}")
        elif isinstance(value, dict):
            lines += [line for section in sections_in(hint) for line in _flags(section, value, f"{prefix}{name}.")]
    return lines


def _types(hint: Any) -> set[Any]:
    if get_origin(hint) is Annotated:
        return _types(get_args(hint)[0])
    return {hint, *(t for part in get_args(hint) if get_origin(hint) is not Literal for t in _types(part))}


def _lines(error: ValidationError, kind: type[Any], also_known: Iterable[str], where: str) -> list[str]:
    lines = []
    problems = [(*_place(kind, problem["loc"], problem["type"] in _UNKNOWN), problem) for problem in error.errors()]
    for keys, known, problem in problems:
        key, cause = ".".join(keys), problem.get("ctx", {}).get("error")
        if problem["type"] in _UNKNOWN:
            known = [*known, *(also_known if len(keys) == 1 else ())]
            lines.append(f"unknown key {key!r}{where}{did_you_mean(keys[-1], known)}")
        elif isinstance(cause, Problems):
            lines += cause.lines
        elif problem["type"] in ("literal_error", "string_type") and isinstance(problem["input"], dict | list | tuple):
            deeper = any(other[: len(keys)] == keys and len(other) > len(keys) for other, _, _ in problems)
            if not deeper:  # else the union's other branch says more
                lines.append(f"{key}: {_message(problem)}, not {problem['input']!r}")
        elif problem["type"] == "literal_error":
            lines.append(f"{key}: {_message(problem)}, not {problem['input']!r}{_near(problem)}")
        else:
            message = _message(problem)
            lines.append(f"{key}: {message}, not {problem['input']!r}" if key else message)
    return lines


def _message(problem: Any) -> str:
    if problem["type"] in ("model_type", "dataclass_type"):
        return "Input should be a section of keys and values"
    return problem["msg"].removeprefix("Value error, ")


def _near(problem: Any) -> str:
    """The hint at the nearest word, for a value that is none of the words there are."""
    expected = problem["ctx"]["expected"].replace(" or ", ", ").split(", ")
    return did_you_mean(str(problem["input"]), [word.strip("'") for word in expected])


def _place(kind: type[Any], location: Sequence[str | int], ends_in_key: bool) -> tuple[list[str], list[str]]:
    """(the keys on the way to a problem, those known in its section); pydantic's names of union branches are none."""
    keys: list[str] = []
    here = [kind]
    for i, part in enumerate(location):
        named = [fields_of(section)[part] for section in here if part in fields_of(section)]
        last = i == len(location) - 1
        if isinstance(part, int) or named or (last and (ends_in_key or not _is_branch(part, here))):
            keys.append(str(part))
        elif any(section.__name__ == part for section in here):
            here = [section for section in here if section.__name__ == part]
        if named:
            here = [section for hint in named for section in sections_in(hint)]
    return keys, [name for section in here for name in fields_of(section)]


def _is_branch(part: str | int, here: list[type[Any]]) -> bool:
    """Whether pydantic calls a branch of a union so: a type, or what wraps one, as in `function-after[f(), int]`."""
    name = str(part).removeprefix("constrained-")
    return "[" in name or name in [*(section.__name__ for section in here), "int", "float", "str", "bool", "none"]
