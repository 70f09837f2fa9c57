"""Training runs for the tests: settings of a tiny one, many in one process group, and what they report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lamella.run.folder import RunDir

STEPS = 12
COMMON = {
    "seq_len": 32,
    "steps": STEPS,
    "samples_per_step": 6,
    "samples_per_micro_batch": 2,
    "lr": 1e-2,
    "warmup_steps": 2,
    "save_every_steps": 4,
    "keep_checkpoints": 0,
    "heldout_every_steps": 4,
    "heldout_samples": 8,  # no multiple of ranks * micro-batch: blank samples fill the rest
    "threads_per_rank": 1,
    "frozen_weights": "sharded",
    "tensorboard": "false",
}
# fp32: another number of ranks or micro-batches adds the same terms in another order; 5e-7 was seen after 12 steps
REORDERED = 2e-5


def run_many(folder: Path, num_ranks: int, runs: list[list[str]]) -> None:
    """Train one run after the other in one process group; each is the words after `train.py`."""
    torchrun("train_many.py", folder, num_ranks, runs)


def torchrun(script: str, folder: Path, num_ranks: int, jobs: list[Any]) -> None:
    """Run a script of this folder on the jobs; caches and files of it go to `folder`."""
    file = folder / f"jobs-{num_ranks}.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name(script)), str(file)],
        env=os.environ | {"LAMELLA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[:8000]


def lines(folder: Path, name: str) -> list[dict]:
    return list(RunDir(folder / name).metrics())


def losses(folder: Path, name: str) -> list[float]:
    return [line["loss"] for line in lines(folder, name) if line["step"] > 0]


def heldout(folder: Path, name: str) -> list[float]:
    return [line["heldout_loss"] for line in lines(folder, name) if line["heldout_loss"] is not None]
