"""The reference pages, made from the code: every command with its options, every recipe with its keys.

Run: uv run python docs/reference.py reference/commands.md      (prints a page; mkdocs makes them by docs/hooks.py)
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import TypeAdapter

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from lamella import cli
from lamella.recipe.conversion import OPTIONS, options_type
from lamella.recipe.training import HARMLESS, SECTIONS, Recipe

Schema = dict[str, Any]
OWN = {
    "model": ("name or path, or none", "none", "Folder, .gguf file or hub name. None: the embedded SmolLM2-135M."),
    "out": ("path, or none", "artifacts/moe", "The folder to make."),
    "method": ("", "slice", "Which way to make experts; the sections below are the methods."),
}


def field_docs(kind: type) -> dict[str, str]:
    """The string below each field of a class, those of its bases included."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        if not hasattr(base, "__annotations__") or base.__module__.startswith("pydantic"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                found = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
                docs[statement.target.id] = inspect.cleandoc(found)
    return docs


def summary(kind: type) -> str:
    """The class's docstring as prose."""
    return prose(inspect.cleandoc(kind.__doc__ or ""))


def prose(text: str) -> str:
    """One line, with what a Markdown table would take for its own escaped."""
    text = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return re.sub(r"`([^`]*)\\([|*])([^`]*)`", r"`\1\2\3`", text)


def type_words(schema: Schema) -> str:
    """A JSON schema as words for people."""
    if "anyOf" in schema:
        return ", or ".join(dict.fromkeys(type_words(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema or "allOf" in schema:
        reference = schema.get("$ref") or schema["allOf"][0]["$ref"]
        return f"section [{section_name(reference)}](#{section_name(reference).lower()})"
    if schema.get("type") == "array":
        return f"list of {type_words(schema.get('items', {}))}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    words |= {"null": "none", "object": "section"}
    return words.get(str(schema.get("type")), "anything") + bounds(schema)


def bounds(schema: Schema) -> str:
    """' from 0 to 1' and the like."""
    said = []
    for key, words in (("minimum", "at least"), ("exclusiveMinimum", "above"), ("maximum", "at most"),
                       ("exclusiveMaximum", "below")):  # fmt: skip
        if key in schema:
            said.append(f"{words} {schema[key]:g}")
    return f" ({', '.join(said)})" if said else ""


def section_name(reference: str) -> str:
    return reference.rpartition("/")[2]


def value_words(value: Any) -> str:
    """A default as YAML on one line."""
    if value is dataclasses.MISSING:
        return "must be given"
    if value is None:
        return "none"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    return f"`{text}`"


def key_table(schema: Schema, docs: dict[str, str], harmless: frozenset[str] | None = None) -> str:
    """A table of one section's keys. `harmless`: keys that may change in a run that has begun; None leaves that out."""
    mark = harmless is not None
    lines = ["| key | value | default | what it does |" + (" may change |" if mark else "")]
    lines.append("|---|---|---|---|" + ("---|" if mark else ""))
    for key, part in schema.get("properties", {}).items():
        default = value_words(part.get("default", dataclasses.MISSING if key in schema.get("required", ()) else {}))
        row = f"| `{key}` | {type_words(part)} | {default} | {prose(docs.get(key, ''))} |"
        lines.append(row + (f" {'yes' if key in harmless else ''} |" if harmless is not None else ""))
    return "\n".join(lines)


def training_page() -> str:
    """Every key of a training recipe and of its sections."""
    schema = Recipe.model_json_schema()
    parts = [
        "# Training recipes",
        "A training recipe is a YAML file. `key=value` words on the command line change it; `a.b=value` reaches into a "
        "section. An unknown key is an error. This page is made from the code.",
        "*May change*: a run that has begun can go on with another value of such a key. Another value of any other key "
        "is another run, and needs another `out`.",
        key_table(schema, field_docs(Recipe), frozenset(HARMLESS)),
    ]
    named = {kind.__name__: kind for kind in SECTIONS.values()}
    for name, part in schema["$defs"].items():
        if name in named:
            keys = ", ".join(f"`{key}`" for key, kind in SECTIONS.items() if kind is named[name])
            parts += [f"## {name}", f"Under {keys}. {summary(named[name])}", key_table(part, field_docs(named[name]))]
    parts += [
        "## Stages",
        "`stages` is a list of sections, each with a `name` and any of the keys above but `model` and `out`. They run "
        "one after the other, each from the result of the one before. See [train in stages](../how-to/stages.md).",
    ]
    return "\n\n".join(parts) + "\n"


def conversion_page() -> str:
    """Every key of every method of conversion."""
    methods = ", ".join(f"`{method}`" for method in OPTIONS)
    own = [f"| `{key}` | {value or methods} | `{default}` | {told} |" for key, (value, default, told) in OWN.items()]
    parts = [
        "# Conversion recipes",
        "A conversion recipe is a YAML file, or `key=value` words after `lamella convert`, or both. An unknown key is "
        "an error. This page is made from the code.",
        "\n".join(["| key | value | default | what it does |", "|---|---|---|---|", *own]),
    ]
    sections: dict[str, tuple[type, Schema]] = {}
    for method in OPTIONS:
        kind = options_type(method)
        schema = TypeAdapter(kind).json_schema()
        parts += [f"## Method `{method}` {{ #{method} }}", summary(kind), key_table(schema, field_docs(kind))]
        for name, part in schema.get("$defs", {}).items():
            sections[name] = (find_class(kind, name), part)
    for name, (section, part) in sections.items():
        parts += [f"## {name}", summary(section), key_table(part, field_docs(section))]
    return "\n\n".join(parts) + "\n"


def find_class(kind: type, name: str) -> type:
    """A class by its name, from the modules of a class and of its bases."""
    for base in kind.__mro__:
        found = getattr(importlib.import_module(base.__module__), name, None)
        if isinstance(found, type):
            return found
    raise LookupError(f"{name} is not in the modules of {kind}")


SCRIPTS: dict[str, Callable[..., Any]] = {
    "convert_by_slicing.py": cli.convert_by_slicing,
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
