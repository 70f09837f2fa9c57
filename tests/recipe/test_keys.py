"""Keys are said once, on the field: the checker, `lamella keys`, commands and reference take them from there."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import dataclass

import pytest
from pydantic import PositiveInt
from typer.testing import CliRunner

from lamella.cli import app
from lamella.errors import UserError
from lamella.recipe.check import Harmless, Options, Problems, Strict, checked, harmless_keys
from lamella.recipe.conversion import make_conversion
from lamella.recipe.keys import Key, describe, keys
from lamella.recipe.methods import METHODS
from lamella.recipe.training import make_recipe

ALL = [("train", None), ("convert", None), *(("convert", method) for method in METHODS)]


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_every_key_has_a_type_and_a_sentence(kind: str, method: str | None) -> None:
    for key in keys(kind, method):
        assert key.type, key.name
        assert key.text.endswith("."), key.name
        assert key.text[0].isupper(), key.name


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_keys_are_readable_in_80_columns(kind: str, method: str | None) -> None:
    done = CliRunner().invoke(app, ["keys", kind, *([method] if method else [])])
    assert done.exit_code == 0
    assert max(len(line) for line in done.stdout.splitlines()) <= 80
    for key in keys(kind, method):
        assert f"\n{key.name}: " in f"\n{done.stdout}"


@pytest.mark.parametrize(("kind", "method"), ALL)
def test_defaults_are_what_a_recipe_without_the_key_has(kind: str, method: str | None) -> None:
    """A recipe that writes every default out is the one that writes none."""
    import yaml

    listed = {key.name: yaml.safe_load(key.default) for key in keys(kind, method) if key.default}
    said = {name: value for name, value in listed.items() if "." not in name and name != "stages"}
    if kind == "train":
        assert make_recipe(said) == make_recipe({})
    elif method is not None:
        assert make_conversion(said | {"method": method}) == make_conversion({"method": method})


class Inner(Strict):
    """A section."""

    size: PositiveInt
    """It is so large."""


class Outer(Strict):
    """A recipe."""

    inner: Inner | None = None
    """It is inside."""
    shown: Harmless[bool] = False
    """It is shown."""


@dataclass(frozen=True)
class Made(Options):
    """Options that two things may be wrong with."""

    low: int = 0
    """The lower end."""
    high: int = 1
    """The upper end."""

    def problems(self) -> list[str]:
        found = ["low is negative"] if self.low < 0 else []
        return found + (["low is above high"] if self.low > self.high else [])


def test_all_that_is_wrong_is_said_at_once_for_models_and_dataclasses() -> None:
    assert checked(Outer, {"inner": {"size": 0, "sise": 1}, "shwon": 1}) == (
        None,
        [
            "inner.size: Input should be greater than 0, not 0",
            "unknown key 'inner.sise' (did you mean 'size'?)",
            "unknown key 'shwon' (did you mean 'shown'?)",
        ],
    )
    assert checked(Made, {"low": -1, "high": -2}) == (None, ["low is negative", "low is above high"])
    with pytest.raises(Problems, match="low is negative; low is above high"):
        Made(low=-1, high=-2)


def test_yes_and_no_are_no_numbers() -> None:
    assert checked(Outer, {"inner": {"size": True}})[1] == ["inner.size: it is a number, not true"]
    assert checked(Outer, {"shown": True})[0] == Outer(shown=True)
    for values in ({"steps": True}, {"lr": float("inf")}, {"parallel": {"context": False}}):
        with pytest.raises(UserError, match=next(iter(values))):
            make_recipe(values)


def test_a_training_has_no_other_method() -> None:
    with pytest.raises(UserError, match="the method of a training is 'slice'; it must be one of adapters"):
        keys("train", "slice")


def test_harmless_is_said_on_the_field() -> None:
    assert harmless_keys(Outer) == {"shown"}
    marked = {key.name for key in keys("train") if key.harmless}
    assert {"out", "log_every_steps", "parallel.expert"} <= marked
    assert not marked & {"lr", "data", "steps", "seed"}


def test_a_key_is_wrapped_below_its_name() -> None:
    text = describe([Key("a.b", "int > 0", "3", "It counts " + "many " * 30 + "things.")])
    assert text.splitlines()[0] == "a.b: int > 0, default 3"
    assert all(line.startswith("    ") for line in text.splitlines()[1:])


HEAVY = ("torch", "transformers", "datasets", "torchtitan", "pyarrow", "numpy", "rich.progress")
MISTAKES = {
    "convert": ["convert", "gaet=softmax"],
    "convert by a method": ["convert", "method=partition", "calibration.tokens=3"],
    "train": ["train", "stepz=3"],
    "plan": ["plan", "stepz=3"],
    "plan of a conversion": ["plan", "--dense", "nowhere", "--conversion", "gaet=softmax"],
    "data": ["data", "prepare", "x", "--model", "y", "--out", "z", "--on-bad-data", "drop"],
    "keys": ["keys", "convert", "partitoin"],
    "help": ["--help"],
    "help of convert": ["convert", "--help"],
    "list of keys": ["keys", "train"],
}


@pytest.mark.faults
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_and_help_are_answered_before_anything_heavy_is_imported(case: str) -> None:
    code = f"""
import sys
sys.argv = ["lamella", *{MISTAKES[case]!r}]
from lamella.cli import main
try:
    main()
except SystemExit as end:
    print(end.code, [name for name in {HEAVY!r} if name in sys.modules])
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1  # a second of CPU
    is_mistake = "help" not in case and "list" not in case
    assert done.stdout.splitlines()[-1] == f"{2 if is_mistake else 0} []"
    assert done.stderr.startswith("error: ") == is_mistake


@pytest.mark.parametrize(
    ("words", "completed"),
    [("lamella tr", ["train"]), ("lamella keys convert ", list(METHODS)), ("lamella ke", ["keys"])],
)
def test_a_shell_completes_commands_and_methods(words: str, completed: list[str]) -> None:
    """As bash asks for it."""
    asked = {"_LAMELLA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    code = "import sys; sys.argv = ['lamella']; from lamella.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == completed
