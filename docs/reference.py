"""The reference pages, made from the code: every command with its options, every recipe with its keys.

Run: uv run python docs/reference.py reference/commands.md      (prints a page; mkdocs makes them by docs/hooks.py)
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from lamella import cli
from lamella.by_slicing import convert_by_slicing
from lamella.recipe.keys import Key, keys
from lamella.recipe.methods import METHODS


def prose(text: str) -> str:
    """One line, with what a Markdown table would take for its own escaped."""
    text = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return re.sub(r"`([^`]*)\\([|*])([^`]*)`", r"`\1\2\3`", text)


def key_table(keys: list[Key], marks: bool = False) -> str:
    """A table of keys; `marks` adds whether a run that has begun can go on with another value."""
    lines = ["| key | value | default | what it does |" + (" may change |" if marks else "")]
    lines.append("|---|---|---|---|" + ("---|" if marks else ""))
    for key in keys:
        default = f"`{key.default}`" if key.default else ""
        row = f"| `{key.name}` | {key.type.replace(' | ', ', ')} | {default} | {prose(key.text)} |"
        lines.append(row + (f" {'yes' if key.harmless else ''} |" if marks else ""))
    return "\n".join(lines)


def training_page() -> str:
    """Every key of a training recipe and of its sections."""
    parts = [
        "# Training recipes",
        "A training recipe is a YAML file. `key=value` words on the command line change it; `a.b=value` reaches into a "
        "section. An unknown key is an error. `lamella keys train` prints this page in a terminal; both are made from "
        "the code.",
        "*May change*: a run that has begun can go on with another value of such a key. Another value of any other key "
        "is another run, and needs another `out`.",
        key_table(keys("train"), marks=True),
        "## Stages",
        "`stages` is a list of sections, each with a `name` and any of the keys above but `model` and `out`. They run "
        "one after the other, each from the result of the one before. See [train in stages](../how-to/stages.md).",
    ]
    return "\n\n".join(parts) + "\n"


def conversion_page() -> str:
    """Every key of every method of conversion."""
    parts = [
        "# Conversion recipes",
        "A conversion recipe is a YAML file, or `key=value` words after `lamella convert`, or both. An unknown key is "
        "an error. `lamella keys convert METHOD` prints a method's keys in a terminal; both are made from the code.",
        key_table(keys("convert")),
    ]
    for name, method in METHODS.items():
        parts += [f"## Method `{name}` {{ #{name} }}", prose(inspect.getdoc(method.options) or "")]
        parts.append(key_table(keys("convert", name)))
    return "\n\n".join(parts) + "\n"


SCRIPTS: dict[str, Callable[..., Any]] = {
    "convert_by_slicing.py": convert_by_slicing,
    "tests/moe_logit_match.py": cli.verify,
}
OPTION_TYPES = {int: "whole number", float: "number", str: "text", bool: "", Path: "path"}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that a user can type: its words, and what typer makes of it; in the order of the help."""
    yield from walk("lamella", typer.main.get_command(cli.app))
    for words, function in SCRIPTS.items():
        single = typer.Typer(add_completion=False)
        single.command()(function)
        yield words, typer.main.get_command(single)


def walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    """The commands below a group, or the command itself."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, inner in command.commands.items():
        if not inner.hidden:
            yield from walk(f"{words} {name}", inner)


def commands_page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Commands",
        "Every command answers `--help`. Bad input is one line that says what to do, and exit code 2. This page is "
        "made from the code.",
    ]
    for words, command in commands():
        if words == "tests/moe_logit_match.py":
            parts += [f"## {words}", "The same as `lamella verify`; pytest collects its tests."]
            continue
        parts += [f"## {words}", prose(command.help or "")]
        rows = [option_row(parameter) for parameter in command.params if not parameter.hidden]
        if rows:
            parts.append("\n".join(["| option | value | default | what it does |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def option_row(parameter: Any) -> str:
    """A line of the table about one argument or option."""
    is_option = parameter.opts[0].startswith("-")
    name = ", ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else parameter.metavar
    kind = OPTION_TYPES.get(parameter.type_descriptor.annotation, "text") if is_option else "words"
    default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    if parameter.required:
        default = "must be given"
    elif isinstance(default, bool):
        default = "yes" if default else "no"
    told = "" if default is None else prose(str(default))
    return f"| `{name}` | {kind} | {told} | {prose(parameter.help or '')} |"


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/conversion-recipes.md": conversion_page,
    "reference/training-recipes.md": training_page,
}

if __name__ == "__main__":
    for page in sys.argv[1:] or PAGES:
        print(PAGES[page]())
