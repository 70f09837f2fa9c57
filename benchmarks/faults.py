"""Run: uv run benchmarks/faults.py [--steps 120] [--out FILE.json]

`lamella train` on 2 ranks of this machine with a fault after every 30 steps: a rank killed, a signal to a rank, the
newest checkpoint damaged before another kill. More than 120 steps have torchrun itself killed as well, and then the
same four in turn. Prints where the wall time went and the effective training time: the share of it whose steps are part
of the result. Start-up bounds it, so what a step takes decides: here 60 samples of 512 tokens (5.6 s on two cores).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from measure import positive

from lamella.run.effective import effective_time
from lamella.run.folder import RunDir
from support.models import trainable_moe

EVERY_STEPS = 30
KINDS = ("kill:rank=1", "signal:rank=1", "damage:rank=0; kill:rank=0", "kill-agent:rank=0")


def faults(steps: int) -> list[str]:
    """One in each stretch of EVERY_STEPS but the last, for LAMELLA_FAULT."""
    places = range(EVERY_STEPS, steps, EVERY_STEPS)
    plans = (KINDS[i % len(KINDS)].split("; ") for i in range(len(places)))
    return [
        f"{part},step={step},attempt={i}"
        for i, (step, kinds) in enumerate(zip(places, plans, strict=True))
        for part in kinds
    ]


def train(folder: Path, args: argparse.Namespace) -> RunDir:
    words = [
        f"model={folder / 'model'}", f"out={folder / 'run'}", "data=[python-docs]", f"seq_len={args.seq_len}",
        f"steps={args.steps}", f"samples_per_step={args.samples}", "heldout_samples=0", "tensorboard=false",
        f"save_every_steps={args.save_every}", "checkpoint_async=true", "threads_per_rank=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "lamella.cli", "train", "--nproc", "2", *words]
    subprocess.run(command, env=os.environ | {"LAMELLA_FAULT": ";".join(faults(args.steps))}, check=True)
    return RunDir(folder / "run")


def account(run: RunDir) -> dict[str, Any]:
    """Seconds of each attempt's start (to the first step), of computing steps again, of what lies between attempts."""
    events, lines = run.events(), run.all_metrics()
    starts, running = run.events("start"), run.events("running")
    ends = [max(e["time"] for e in events if e["time"] < s["time"]) for s in starts[1:]]
    repeated = [a["step"] - b["step"] for a, b in pairwise(lines) if b["step"] <= a["step"]]
    durations = [b["time"] - a["time"] for a, b in pairwise(lines) if b["step"] == a["step"] + 1]
    return {
        "start_s": [round(b["time"] - a["time"], 1) for a, b in zip(starts, running, strict=True)],
        "between_attempts_s": [round(s["time"] - e, 1) for s, e in zip(starts[1:], ends, strict=True)],
        "steps_computed_again": sum(n + 1 for n in repeated),
        "step_s": round(statistics.median(durations), 3),
        "faults": [f"{f['failure']}: {f['reason'].splitlines()[0][:100]}" for f in run.events("fault")],
        "fallbacks": len(run.events("fallback")),
    }


def needed_step_s(measured: dict[str, Any], spent: dict[str, Any], share: float = 0.9) -> float:
    """Seconds a step must take for this share, with a fault every EVERY_STEPS and the same loss at each fault."""
    lost_s = (measured["wall_s"] - measured["effective_s"]) / max(1, measured["restarts"] + 1)
    return share / (1 - share) * lost_s / EVERY_STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=120)
    parser.add_argument("--save-every", type=positive, default=1)
    parser.add_argument("--seq-len", type=positive, default=512)
    parser.add_argument("--samples", type=positive, default=60)
    parser.add_argument("--hidden", type=positive, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "max_position_embeddings": 4096}
        trainable_moe(folder / "model", **shape)
        run = train(folder, args)
        measured, spent = effective_time(run), account(run)
    result = measured | spent | {
        "needed_step_s_for_90_percent": round(needed_step_s(measured, spent), 1),
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }  # fmt: skip
    for key, value in result.items():
        print(f"{key:30} {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
