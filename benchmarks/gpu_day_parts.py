"""The parts of gpu_day.py that no other benchmark measures, each in a process of its own.

Run: python benchmarks/gpu_day_parts.py resume --device cuda --folder DIR --json FILE
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

GIB = 2**30
SMALL = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 16384,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
WIDE = {  # two layers of Llama 3 8B, with an eighth of its vocabulary
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 16032,
}  # fmt: skip
PACKAGES = ("torch", "triton", "torchtitan", "transformers", "quack-kernels", "sonic-moe", "pytest")
STEPS, SAVED = 6, 3
OFFLOADED_CLOSE = 2e-3
"""The same sums in bfloat16, whose order on a GPU may differ from run to run."""
WITHIN = (0.85, 1.15)
"""Of a plan's peak over a measured one."""


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, driver and compiler; fails where torch sees no GPU though one is asked for."""
    import torch

    from lamella.run.gpus import driver_version

    rows = [["python", platform.python_version()]]
    for package in PACKAGES:
        try:
            rows.append([package, importlib.metadata.version(package)])
        except importlib.metadata.PackageNotFoundError:
            rows.append([package, "not installed"])
    rows += [["CUDA of torch", str(torch.version.cuda)], ["driver", driver_version() or "none"]]
    rows.append(["gcc, for Triton", shutil.which("gcc") or "MISSING"])
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        rows.append(["GPU", f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"])
    return {"rows": rows, "passed": True}


def converted(args: argparse.Namespace, sizes: dict[str, int], name: str, dtype: str = "float32") -> Path:
    """A drawn dense Llama, and what lamella makes of it: NAME and NAME-moe in the folder of this day."""
    from lamella.conversion import convert
    from lamella.recipe.methods.slice import SliceOptions
    from plan import write_model

    dense, moe = args.folder / name, args.folder / f"{name}-moe"
    if not (moe / "config.json").is_file():
        shutil.rmtree(dense, ignore_errors=True)
        write_model(dense, sizes, is_dense=True, tied=False)
        config = dense / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
        convert(dense, moe, SliceOptions(dtype=dtype), overwrite=moe.exists())
    return moe


def train(args: argparse.Namespace, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """The metrics of a run by `lamella.worker`, in a process of its own."""
    values = {
        "out": out, "data": "[python-docs]", "steps": STEPS, "save_every_steps": SAVED, "heldout_samples": 0,
        "tensorboard": "false", "threads_per_rank": 1, "seq_len": 128, "samples_per_step": 2, "warmup_steps": 0,
        "keep_checkpoints": 0, "torchtitan.debug.deterministic": "true",
        "torchtitan.debug.deterministic_warn_only": "true",  # an operation without such a form must not end the run
    } | settings  # fmt: skip
    words = [f"{key}={value}" for key, value in values.items()]
    done = subprocess.run([sys.executable, "-m", "lamella.worker", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        log = out / "log.txt"
        said = (done.stderr or done.stdout or (log.read_text() if log.is_file() else "")).strip().splitlines()
        sys.exit(f"the run ended with exit code {done.returncode}: {said[-1] if said else 'it said nothing'}")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def sizes_of(args: argparse.Namespace) -> tuple[dict[str, int], str]:
    return (TINY, "tiny") if args.tiny else (SMALL, "small")


def resume(args: argparse.Namespace) -> dict[str, Any]:
    """Train, then continue a copy from its middle checkpoint in a new process: the losses must be the same bits."""
    from lamella.run.folder import RunDir
    from lamella.run.store import LATEST

    moe, out, again = converted(args, *sizes_of(args)), args.folder / "run", args.folder / "run-again"
    whole = {line["step"]: line["loss"] for line in train(args, out, model=moe)}
    shutil.copytree(out, again, ignore=shutil.ignore_patterns("hf", f"step-{STEPS}"))
    copy = RunDir(again)
    copy.write_status("stopped", SAVED, STEPS)
    copy.metrics_file.unlink()
    (copy.checkpoints / LATEST).write_text(f"{SAVED}\n")
    resumed = {line["step"]: line["loss"] for line in train(args, again, model=moe) if line["step"] > SAVED}
    equal = len(resumed) == STEPS - SAVED and all(whole[step] == loss for step, loss in resumed.items())
    rows = [["losses after the checkpoint", "equal bit for bit" if equal else f"DIFFER: {whole} and {resumed}"]]
    return {"rows": rows, "passed": equal, "whole": whole, "resumed": resumed}


def offload(args: argparse.Namespace) -> dict[str, Any]:
    """The same steps with frozen experts in main memory, then with all weights, gradients and moments: the same losses,
    each time less of the GPU's memory."""
    moe = converted(args, *sizes_of(args))
    runs = [
        train(args, args.folder / f"run-offload-{where}", model=moe, offload=where, steps=SAVED)
        for where in ("none", "frozen", "cpu")
    ]
    steps = [[line["loss"] for line in lines] for lines in zip(*runs, strict=True)]
    close = all(abs(plain - other) <= OFFLOADED_CLOSE * abs(plain) for plain, *others in steps for other in others)
    peaks = [max(line["peak_gib"] for line in lines) for lines in runs]
    rows = [["losses", " ".join("/".join(f"{loss:.5f}" for loss in losses) for losses in steps)]]
    rows.append(["peak of offload none, frozen, cpu", f"{', '.join(f'{peak:.2f}' for peak in peaks)} GiB"])
    return {"rows": rows, "passed": close and peaks[0] > peaks[1] > peaks[2], "losses": steps, "peak_gib": peaks}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """A run's peak beside the plan's, of a model whose layers are as wide as Llama 3 8B's."""
    from lamella.plan.command import make_layout
    from lamella.plan.memory import fullest
    from lamella.plan.model import read_model
    from lamella.recipe.training import make_recipe

    moe = converted(args, WIDE, "wide", "bfloat16")
    rows, passed = [], True
    for checkpointing in ("none", "full"):
        settings = {"seq_len": 2048, "samples_per_step": 4, "samples_per_micro_batch": 2, "steps": 3}
        settings |= {"activation_checkpointing": checkpointing}
        lines = train(args, args.folder / f"run-{checkpointing}", model=moe, save_every_steps=1000, **settings)
        measured = max(line["peak_gib"] for line in lines)
        planned = fullest(make_layout(make_recipe({"model": str(moe)} | settings), read_model(moe), 1, "H100")).peak()
        ratio = planned.total_bytes / GIB / measured
        passed &= WITHIN[0] <= ratio <= WITHIN[1]
        what = f"checkpointing {checkpointing}: planned, measured"
        rows.append([what, f"{planned.total_bytes / GIB:.2f} and {measured:.2f} GiB, {ratio:.2f}x"])
    return {"rows": rows, "passed": passed}


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """The logits of the converted model beside the dense one's, on this device."""
    from lamella.evaluate.logit_match import logit_match

    moe = converted(args, *sizes_of(args))
    windows = 256  # fewer tokens make a sample on which chance decides
    tokens = {"float32": 2 * windows, "bfloat16": windows}
    dense = moe.with_name(moe.name.removesuffix("-moe"))
    checks = logit_match(str(dense), str(moe), tokens=tokens, seq_len=windows, device=args.device)
    bound = [check for check in checks if check.bound is not None]
    worst = max(check.figure for check in bound if check.name == "max |logit difference|" and check.dtype == "float32")
    rows = [["checks passed", f"{sum(check.passed for check in bound)} of {len(bound)}"]]
    rows.append(["max |logit difference|, float32", f"{worst:.1e}"])
    passed = all(check.passed for check in bound)
    return {"rows": rows, "passed": passed, "checks": [check.to_dict() for check in checks]}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "machine": machine, "memory": memory, "resume": resume, "offload": offload, "verify": verify,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, required=True, help="models and runs are made here, and kept for others")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    report = PARTS[args.part](args)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    if not report["passed"]:
        sys.exit(f"{args.part}: the figures are not as they should be")


if __name__ == "__main__":
    main()
