"""The commands of the README and of docs/: found, checked as the real command line checks them, and run."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from lamella import cli, cli_runs
from lamella.by_slicing import convert_by_slicing
from lamella.recipe.conversion import load_conversion
from lamella.run.launch import arguments, prepare_stages
from lamella.service.jobs import Submission

ROOT = Path(__file__).parents[2]
# In the order of reading, so that what a page uses is there when its commands run.
FIRST_PAGES = ("README.md", "CONTRIBUTING.md", "docs/quick-start.md", "docs/how-to/convert.md")
SET_UP = ("pip install uv", "uv sync")
SHELL = ("cat", "tail")
SCRIPTS = {"convert_by_slicing.py": convert_by_slicing, "tests/moe_logit_match.py": cli.verify}
DENSE = "path/to/Llama-3.1-8B"
TOOLS = {"ruff": "check format", "mypy": "", "lint-imports": "", "mkdocs": "build serve", "tensorboard": ""}


def pages() -> list[Path]:
    """Every page that a reader may follow, in the order of reading."""
    first = [ROOT / name for name in FIRST_PAGES]
    return first + sorted(set((ROOT / "docs").rglob("*.md")) - set(first))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of the bash blocks."""
    return [line for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]


def check(command: str) -> None:
    """Raise unless the command line that the command names would take it: options, recipe, keys, files."""
    if command in SET_UP:
        return
    words = shlex.split(command)
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    else:
        assert words[0] in (*SHELL, "sbatch"), f"{command}: not run by uv"
    if words[0] == "lamella":
        check_lamella(words[1:])
    elif words[0] in SCRIPTS:
        parse(single(SCRIPTS[words[0]]), words[1:])
    elif words[0] == "torchrun":
        check_recipe(torchrun_words(words[1:]))
    elif words[0] == "sbatch":
        script, *rest = [word for word in words[1:] if not word.startswith("-")]
        assert (ROOT / script).is_file(), command
        check_recipe(rest)
    elif words[0] == "pytest":
        check_pytest(words[1:])
    elif words[0].startswith("benchmarks/"):
        check_benchmark(words[0], words[1:])
    elif words[0] in TOOLS:
        assert not TOOLS[words[0]] or words[1] in TOOLS[words[0]].split(), command
    else:
        assert words[0] in SHELL, f"{command}: no test knows this command"


def check_lamella(words: Sequence[str]) -> None:
    """A command of lamella, with its recipe and keys."""
    command, rest = typer.main.get_command(cli.app), list(words)
    name = "lamella"
    while hasattr(command, "commands"):
        name = rest.pop(0)
        assert name in command.commands, f"lamella has no command {name}"
        command = command.commands[name]
    params = parse(command, rest)
    if name == "convert" and params["words"]:
        settings = list(params["words"])
        load_conversion(settings.pop(0) if "=" not in settings[0] else None, settings)
    elif name in ("train", "plan"):
        check_recipe(params["words"] or [])
    elif name == "submit":
        job = cli_runs.job_of(params["words"] or [], params["kind"], params["ranks"])
        Submission.model_validate({"job": job}).check()


def parse(command: Any, words: Sequence[str]) -> dict[str, Any]:
    """The parameters that a command would be called with; raises for what it refuses."""
    return command.make_context(command.name or "command", list(words)).params


def single(function: Any) -> Any:
    """The command line of a script that is one command."""
    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app)


def check_recipe(words: Sequence[str]) -> None:
    """A training recipe with its settings."""
    prepare_stages(*arguments(words))


def torchrun_words(words: Sequence[str]) -> list[str]:
    """What train.py gets, after torchrun's own options have passed its parser."""
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(list(words))
    assert parsed.training_script == "train.py", words
    return parsed.training_script_args


def check_pytest(words: Sequence[str]) -> None:
    """Folders that exist and marks that are declared."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    known = {mark.partition(":")[0] for mark in options["markers"]}
    mark = words.index("-m") + 1 if "-m" in words else None
    if mark is not None:
        assert words[mark].split()[-1] in known, words
    for place in [w for i, w in enumerate(words) if i != mark and w != "-m"]:
        assert (ROOT / place).exists(), place


def check_benchmark(script: str, words: Sequence[str]) -> None:
    """A benchmark that exists, and options that it or what the benchmarks share declares."""
    texts = [(ROOT / script).read_text(), (ROOT / "benchmarks/adaptation.py").read_text()]
    for option in (word for word in words if word.startswith("--")):
        assert any(f'"{option}"' in text for text in texts), f"{script} has no {option}"


# What a command gets on top where it is run: little text, and few steps of what is real.
SHORT = ["seq_len=64", "heldout_samples=3"]
CALIBRATION = ["calibration={num_tokens: 1024, sequence_length: 128}", "guard=null"]  # no budget for random weights
TINY = ["model=artifacts/llama-moe", "samples_per_step=2", *SHORT]
ON_TOP: tuple[tuple[str, list[str]], ...] = (
    ("lamella demo", ["--steps", "2"]),
    ("train.py", ["model=artifacts/llama-moe", "steps=2", "warmup_steps=1", *SHORT]),
    ("lamella train launch/recipes/demo.yaml", SHORT),
    ("launch/recipes/new-domain.yaml", [*TINY, "steps=2", "warmup_steps=1", "router_fit.samples=4"]),
    ("launch/recipes/demo-stages.yaml", [*TINY, "stages.heal.steps=2", "stages.read.steps=2", "stages.chat.steps=2"]),
    ("lamella plan", SHORT[:1]),
    ("launch/conversions/demo-partition.yaml", [f"model={DENSE}", *CALIBRATION[:1]]),
    ("launch/conversions/llama3-8b-partition.yaml", CALIBRATION),
    (
        "launch/conversions/merge.yaml",
        [f"model={DENSE}", "experts=[{positive_prompts: [abc, cab]}, {positive_prompts: [xyz, yzx]}]"],
    ),
    ("launch/conversions/attention.yaml", [*CALIBRATION[:1], "top_k=1"]),
    ("--task", []),
    ("lamella data generate", ["--tokens", "1024"]),
    ("lamella adapters learn", ["--steps", "2", "--seq-len", "64"]),
    ("lamella adapters route", ["--steps", "2", "--seq-len", "64"]),
    ("lamella evaluate", ["--tokens", "256", "--seq-len", "64"]),
    ("tests/moe_logit_match.py", ["--tokens", "128", "--bf16-tokens", "64", "--seq-len", "64"]),
    ("lamella verify", ["--tokens", "256", "--bf16-tokens", "256"]),
)


# What libraries print, and what lamella says of runs that went wrong: nothing of it belongs among the demo's own lines.
NOT_THE_DEMOS = ("it/s]", "Loading weights", "de-quantizing", "Warning", "WARNING", "effective training time")


def is_run(command: str) -> bool:
    """Whether the tests run it; what they only check takes GPUs, a cluster, hours, or is what runs the tests."""
    words = shlex.split(command.removeprefix("uv run "))
    if command in SET_UP or words[0] in (*TOOLS, "pytest", "sbatch") or words[0].startswith("benchmarks/"):
        return False
    if words[:2] == ["lamella", "serve"] or (words[:3] == ["lamella", "runs", "submit"] and "--dry-run" not in words):
        return False  # ends when somebody ends it; trains beside the tests
    if words[:2] == ["lamella", "serve-model"]:
        return False  # ends when somebody ends it, and wants a server; tests/export/test_serving.py starts them
    if any(word.startswith("http") for word in words):
        return False  # nobody started the server; tests/evaluate/test_served.py does
    # llama.cpp has no name for the tiny model's tokenizer of bytes; tests/export has real ones
    if "gguf" in words or "artifacts/llama-gguf" in words:
        return False
    return "plan" in words or not any(word.startswith("launch/recipes/llama3-8b") for word in words)


def run(command: str, folder: Path) -> None:
    """Run a command in `folder`, whose `dense` stands for the reader's model; AssertionError unless it succeeds."""
    more = next((words for part, words in ON_TOP if part in command), [])
    words = [word.replace(DENSE, str(folder / "dense")) for word in [*shlex.split(command), *more]]
    if "artifacts/run" in words:  # trained on the tiny model
        words = [str(folder / "dense") if word == "embedded" else word for word in words]
    if words[:3] == ["uv", "run", "lamella"] and words[3] != "demo":
        run_here(typer.main.get_command(cli.app), words[3:], folder)
    elif words[:2] == ["uv", "run"] and words[2] in SCRIPTS:
        run_here(single(SCRIPTS[words[2]]), words[3:], folder)
    else:
        if words[:2] == ["uv", "run"]:
            words = ["uv", "run", "--no-sync", *words[2:]]
        environment = os.environ | {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_NO_SYNC": "1"}
        environment.pop("VIRTUAL_ENV", None)
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        if "demo" in words:
            foreign = [word for word in NOT_THE_DEMOS if word in done.stdout + done.stderr]
            assert not foreign, f"{foreign} in\n{done.stdout}\n{done.stderr}"


def run_here(command: Any, words: Sequence[str], folder: Path) -> None:
    """In this process, which has imported torch already."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as said:
        code = command.main(args=list(words), standalone_mode=False)
    assert not code, f"{shlex.join(words)}: exit code {code}\n{said.getvalue()[-3000:]}"


def run_python(block: str, folder: Path) -> None:
    """Run a Python block of a page in `folder`."""
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.replace(DENSE, str(folder / "dense")), "<page>", "exec"), {"__name__": "page"})


def to_run() -> Iterator[tuple[Path, str, str]]:
    """(page, "bash" or "python", what to run) in the order of reading, each command once. Pages for developers show
    pieces of code, which are only compiled."""
    seen: set[str] = set()
    for page in pages():
        if page.name == "benchmarks.md":  # what gives its figures takes minutes to hours
            continue
        for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
            if language == "python" and "extend" not in page.parts:
                yield page, language, block
            for command in block.splitlines() if language == "bash" else ():
                if command.strip() and command not in seen and is_run(command):
                    seen.add(command)
                    yield page, language, command
