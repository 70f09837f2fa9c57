"""The options of a command made of a section's fields: what is said about a key is said there, once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

from lamella.recipe.check import Options, fields_of
from lamella.recipe.keys import docstrings

Command = TypeVar("Command", bound=Callable[..., None])


def with_fields_of(section: type[Options]) -> Callable[[Command], Command]:
    """Give a command that takes `**options` an option for each field, its docstring the help text.

    Words are taken as they are: the section refuses those that it does not know, all at once.
    """

    def derive(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        parameters = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                parameters += _parameters(section)
            else:
                parameters.append(parameter.replace(annotation=hints[parameter.name]))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return derive


def _parameters(section: type[Options]) -> list[inspect.Parameter]:
    defaults, texts = section(), docstrings(section)
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(defaults, name),
            annotation=Annotated[_on_the_command_line(hint), typer.Option(help=_help(texts[name]))],
        )
        for name, hint in fields_of(section).items()
    ]


def _on_the_command_line(hint: Any) -> Any:
    """The type without its choices: `str` for words, `int | None`."""
    if get_origin(hint) is Literal:
        return str
    parts = [_on_the_command_line(part) for part in get_args(hint)]
    return parts[0] | parts[1] if len(parts) == 2 else hint


def _help(text: str) -> str:
    """The help of a key's docstring: a recipe says null for what a command leaves out."""
    return text.replace("null ", "left out, it ")
