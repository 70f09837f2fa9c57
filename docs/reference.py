"""The reference pages, made from the code: every command with its options, every recipe with its keys.

Run: uv run python docs/reference.py reference/commands.md      (prints a page; mkdocs makes them by docs/hooks.py)
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from lamella import by_slicing, cli
from lamella.recipe.keys import Key, keys
from lamella.recipe.methods import METHODS

SCRIPTS: dict[str, Callable[..., Any]] = {
    "convert_by_slicing.py": by_slicing.convert_by_slicing,
    "tests/moe_logit_match.py": cli.verify,
}
OPTION_TYPES = {int: "whole number", float: "number", bool: "", Path: "path"}
BAR = "\\|"
HEAD = ("| key | value | default | what it does |", "|---|---|---|---|")


def prose(text: str) -> str:
    """One line, with what Markdown would take for its own escaped."""
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"([|*<])", r"\\\1", text) if "`" not in text else text.replace("|", "\\|").replace("<", "&lt;")


def section_of(key: Key) -> str:
    """`guard.` of `guard.total`; '' of a key that is in no section."""
    return key.name[: key.name.rfind(".") + 1]


def tables(all_keys: Iterable[Key], heading: str, *, mark: bool = False) -> Iterator[str]:
    """A table of the keys in no section, then one for each section under a heading of its own.

    Args:
        heading: the heading of the sections, such as '###'.
        mark: whether to say which keys may change in a run that has begun.
    """
    by_section = sorted(all_keys, key=lambda key: section_of(key) != "")  # stable: sections keep their order
    for section, group in groupby(by_section, key=section_of):
        if section:
            yield f"{heading} Section `{section.rstrip('.')}`"
        more = " may change |" if mark else "", "---|" if mark else ""
        yield "\n".join([HEAD[0] + more[0], HEAD[1] + more[1], *(key_row(key, mark) for key in group)])


def key_row(key: Key, mark: bool) -> str:
    """A line of a table of keys."""
    kind = ", ".join(f"`{part.strip()}`" for part in key.type.replace('"', "").split("|"))
    default = f"`{key.default}`" if key.default else "its own" if "section" in key.type else "must be given"
    row = f"| `{key.name}` | {kind} | {default} | {prose(key.text)} |"
    return row + (f" {'yes' if key.harmless else ''} |" if mark else "")


def training_page() -> str:
    """Every key of a training recipe and of its sections."""
    parts = [
        "# Training recipes",
        "A training recipe is a YAML file. `key=value` words on the command line change it; `a.b=value` reaches into a "
        "section. An unknown key is an error. `lamella keys train` prints the same; this page is made from the code.",
        "*May change*: a run that has begun can go on with another value of such a key. Another value of any other key "
        "is another run, and needs another `out`. [Train in stages](../how-to/stages.md) explains `stages`.",
        *tables(keys("train"), "##", mark=True),
    ]
    return "\n\n".join(parts) + "\n"


def conversion_page() -> str:
    """Every key of every method of conversion."""
    parts = [
        "# Conversion recipes",
        "A conversion recipe is a YAML file, or `key=value` words after `lamella convert`, or both. An unknown key is "
        "an error. `lamella keys convert METHOD` prints the same; this page is made from the code.",
        *tables(keys("convert"), "##"),
    ]
    for name, method in METHODS.items():
        parts += [f"## Method `{name}`", prose(inspect.getdoc(method.options) or "")]
        parts += tables(keys("convert", name), "###")
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that a user can type: its words, and what typer makes of it; in the order of the help."""
    yield from walk("lamella", typer.main.get_command(cli.app))
    for words, function in SCRIPTS.items():
        yield words, single(function)


def single(function: Callable[..., Any]) -> Any:
    """The command line of a script that is one command."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app)


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
        parts.append(f"## {words}")
        if words == "tests/moe_logit_match.py":
            parts.append("The same as `lamella verify --no-ratios`; pytest collects its tests.")
            continue
        parts += [prose(text) for text in (command.help or "", command.epilog or "") if text]
        rows = [option_row(parameter) for parameter in command.params if not parameter.hidden]
        if rows:
            parts.append("\n".join([HEAD[0].replace("key", "option"), HEAD[1], *rows]))
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
    return f"| `{name.replace('|', BAR)}` | {kind} | {told} | {prose(parameter.help or '')} |"


PAGES: dict[str, Callable[[], str]] = {
    "reference/commands.md": commands_page,
    "reference/conversion-recipes.md": conversion_page,
    "reference/training-recipes.md": training_page,
}

if __name__ == "__main__":
    for page in sys.argv[1:] or PAGES:
        print(PAGES[page]())
