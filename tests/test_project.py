"""The project itself: its recipes, its requirements, its demo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lamella.demo import check_arguments, run_demo
from lamella.errors import UserError
from lamella.recipe.conversion import load_conversion

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "launch/conversions").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_conversion_recipe_is_valid(path: Path) -> None:
    assert load_conversion(path).out


def test_every_requirement_names_a_test_or_command_that_exists() -> None:
    text = (ROOT / "REQUIREMENTS.md").read_text()
    named = re.findall(r"`((?:tests|benchmarks|launch|src)/[\w./-]+?)(?:::(\w+))?`", text)
    assert len(named) > 20
    for path, function in named:
        assert (ROOT / path).exists(), path
        if function:
            assert re.search(rf"def {function}\b", (ROOT / path).read_text()), f"{path}::{function}"


NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def collected(mark: str) -> list[str]:
    """The tests that `pytest -m mark` runs, as path::function[parameters]."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", mark, "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_every_case_of_the_faults_has_a_row_whose_tests_are_marked() -> None:
    """So that `pytest -m faults` is all of them; a file named whole is marked as one."""
    section = (ROOT / "REQUIREMENTS.md").read_text().partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+(?:, \d+)*) (.*)$", section, re.MULTILINE)
    assert [int(case) for cases, _ in rows for case in cases.split(", ")] == list(range(1, 31))
    marked = {node.partition("[")[0] for node in collected("faults")}
    for cases, row in rows:
        named = NAMED_TEST.findall(row)
        assert named, f"case {cases} names no test"
        for path, function in named:
            if function:
                assert f"{path}::{function}" in marked, f"case {cases}: {path}::{function} is not marked"
            else:
                assert re.search(r"^pytestmark = .*\bfaults\b", (ROOT / path).read_text(), re.MULTILINE), path


def test_the_demo_refuses_before_it_removes_anything(tmp_path: Path) -> None:
    check_arguments(tmp_path, 3, 12)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="something else"):  # a run, but not a demo's
        check_arguments(tmp_path, 3, 12)
    (tmp_path / "report.json").touch()
    (tmp_path / "training.png").touch()
    check_arguments(tmp_path, 3, 12)  # finished, by an earlier version
    (tmp_path / "report.json").unlink()
    (tmp_path / "training.png").unlink()
    (tmp_path / ".lamella-demo").touch()
    check_arguments(tmp_path, 3, 12)  # broken off: only its own
    (tmp_path / "precious.txt").touch()
    for ranks, steps, message in ((3, 12, "something else"), (0, 12, "at least 1"), (3, 1, "at least 2")):
        with pytest.raises(UserError, match=message):
            run_demo(tmp_path, ranks=ranks, steps=steps)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lamella-demo", "precious.txt", "run"]
