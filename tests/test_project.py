"""The project itself: its lock, its README's commands, its documents."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_llama

from lamella.demo import check_arguments, run_demo
from lamella.errors import UserError
from lamella.recipe.conversion import load_conversion

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line.strip()
]
SET_UP = ["pip install uv", "uv sync"]
TESTS = "uv run pytest"


def test_readme_has_two_set_up_commands_one_main_job_and_one_for_the_tests() -> None:
    assert COMMANDS[:4] == [*SET_UP, "uv run lamella demo", TESTS]


def words_of(command: str, folder: Path) -> list[str]:
    """The command as the test runs it: with this interpreter's environment, on a tiny model in place of the 8B one."""
    command = command.replace("path/to/Llama-3.1-8B", str(folder / "dense"))
    words = shlex.split(command)
    assert words[:2] == ["uv", "run"], command
    return ["uv", "run", "--no-sync", *words[2:]]


# What a command gets on top here: the real model on a reduced size.
REDUCED = {
    "uv run lamella demo": ["--steps", "2"],
    "uv run torchrun --nproc-per-node=3 train.py": ["steps=2", "warmup_steps=1", "seq_len=64", "heldout_samples=3"],
}
CONTEXT = ["seq_len=64", "heldout_samples=3"]  # the tiny model's context is short
CALIBRATION = ["calibration={num_tokens: 1024, sequence_length: 128}", "guard=null"]  # no budget for random weights


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the checkout and holds a tiny dense model."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("pyproject.toml", "README.md", "convert_by_slicing.py", "train.py", "launch", "tests", "src"):
        (folder / name).symlink_to(ROOT / name)
    save_llama(folder / "dense")
    return folder


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1"}
    environment.pop("VIRTUAL_ENV", None)
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH")
def test_every_command_of_the_readme_works(checkout: Path) -> None:
    """In order, in one folder, as a reader would."""
    for command in COMMANDS:
        if command in (*SET_UP, TESTS):
            continue
        words = words_of(command, checkout) + REDUCED.get(command, [])
        if "launch/recipes/demo.yaml" in command:
            words += CONTEXT
        if "lamella plan" in command:
            words += CONTEXT[:1]
        if "launch/conversions/" in command:
            words += CALIBRATION
        if "lamella evaluate" in command:
            words += ["--tokens", "256", "--seq-len", "64"]
        done = run(words, checkout)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    check_demo(json.loads((checkout / "artifacts/demo/report.json").read_text()))
    assert (checkout / "artifacts/demo/training.png").stat().st_size > 10_000
    assert json.loads((checkout / "artifacts/llama-glm4/config.json").read_text())["model_type"] == "glm4_moe"


@pytest.mark.parametrize("path", sorted((ROOT / "launch/conversions").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_conversion_recipe_is_valid(path: Path) -> None:
    assert load_conversion(path).out


def check_demo(report: dict) -> None:
    """The demo's figures, within what the project promises of the real model."""
    assert 10 < report["dense"]["perplexity"] < 25
    assert report["convert"]["peak_rss_over_imports_mib"] < 1.2 * 1024
    assert report["parity"]["checks_passed"]
    assert report["parity"]["max_abs_logit_diff"] <= 1e-3
    assert report["parity"]["greedy_tokens_equal"] == 64
    assert report["routed"]["twin_ppl_ratio"] <= 1.0005
    assert report["routed"]["flat_ppl_ratio"] > 10
    assert report["train"]["ranks"] == 3
    assert report["train"]["frozen_unchanged"]
    assert report["train"]["resume_bit_equal"]
    assert report["train"]["heldout_loss_after"] < report["train"]["heldout_loss_before"]
    assert report["export"]["architecture"] == "Glm4MoeForCausalLM"
    assert report["export"]["max_abs_logit_diff"] <= 1e-3


def test_every_requirement_names_a_test_or_command_that_exists() -> None:
    text = (ROOT / "REQUIREMENTS.md").read_text()
    named = re.findall(r"`((?:tests|benchmarks|launch|src)/[\w./-]+?)(?:::(\w+))?`", text)
    assert len(named) > 20
    for path, function in named:
        assert (ROOT / path).exists(), path
        if function:
            assert re.search(rf"def {function}\b", (ROOT / path).read_text()), f"{path}::{function}"


NAMED_TEST = re.compile(r"`(tests/\w+\.py)(?:::(\w+))?`")


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
    assert [int(case) for cases, _ in rows for case in cases.split(", ")] == list(range(1, 18))
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
