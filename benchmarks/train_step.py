"""Run: uv run benchmarks/train_step.py [--shape smollm2] [--ranks 2] [--json FILE]

One optimizer step of a converted Llama whose experts and router train, beside torchtitan's dense Llama of the same
active size that trains all its parameters: same ranks, tokens, optimizer (AdamW, fused), dtype and checkpointing of
activations, steps interleaved in one run. The limit is the ratio of the operations that both need (see
lamella.titan.flops): frozen weights take no gradient. Where torchtitan cannot be imported, both are the models of
transformers.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import (
    interleaved_seconds,
    median_spread,
    peak_resident_bytes,
    positive,
    print_table,
    provenance,
    synchronise,
    write_json,
)
from train_models import Batch, Contestant, Shape, titan_lamella, titan_llama, transformers_model

from lamella.plan.compute import GPUS

SHAPES = {
    "tiny": Shape(128, 512, 2, 4, 2, 512, True),
    "smollm2": Shape(576, 1536, 30, 9, 3, 49152, True),
    "1b": Shape(2048, 8192, 16, 32, 8, 128256, True),  # Llama 3.2 1B
    "8b-layers": Shape(4096, 14336, 4, 32, 8, 16032, False),  # an eighth of Llama 3.1 8B: layers and vocabulary
}
PHASES = ("forward", "backward", "clip", "optimizer")


def shape_of(args: argparse.Namespace) -> Shape:
    shape = SHAPES[args.shape]
    return shape if args.layers is None else shape._replace(layers=args.layers)


def has_torchtitan() -> bool:
    try:
        for module in ("lamella.titan", "torchtitan.trainer"):
            importlib.import_module(module)
    except ImportError:
        return False
    return True


def contestants(args: argparse.Namespace, folder: Path, dtype: torch.dtype) -> dict[str, Callable[[], Contestant]]:
    """The first is the dense model that the others are measured against."""
    shape, L, ac = shape_of(args), args.seq_len, args.activation_checkpointing
    if args.home == "transformers":
        return {
            "transformers Llama, all trained": lambda: transformers_model(shape, L, False, ac, dtype),
            "lamella, experts+router": lambda: transformers_model(shape, L, True, ac, dtype),
        }
    options = {"fsdp_reshard_after_forward": args.reshard}
    return {
        "torchtitan Llama, all trained": lambda: titan_llama(shape, L, ac, options),
        "lamella dense, all trained": lambda: titan_lamella(shape, L, folder / "dense", ac, options, trains="all"),
        "lamella, experts+router, frozen sharded": lambda: titan_lamella(
            shape, L, folder / "moe", ac, options, frozen_weights="sharded"
        ),
        "lamella, experts+router, frozen replicated": lambda: titan_lamella(
            shape, L, folder / "moe", ac, options, frozen_weights="replicated"
        ),
    }


def make_batch(args: argparse.Namespace, device: torch.device) -> Batch:
    """Random tokens; another part of the step's samples on each rank."""
    samples = args.tokens // args.seq_len // dist.get_world_size()
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(SHAPES[args.shape].vocab_size, (samples, args.seq_len + 1), generator=generator).to(device)
    positions = torch.arange(args.seq_len, device=device).expand(samples, -1)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions)


class PhaseClock:
    """Sums up the seconds between the marks of a step."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, defaultdict[str, list[float]](list)

    def start(self) -> None:
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[phase].append(now - self.last)
        self.last = now


def measure(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    batch = make_batch(args, device)
    with tempfile.TemporaryDirectory() as folder:
        built = {
            name: make()
            for index, (name, make) in enumerate(contestants(args, Path(folder), dtype).items())
            if index == 0 or re.search(args.only, name)
        }
    clocks = {name: PhaseClock(device) for name in built}

    def step(name: str) -> None:
        clocks[name].start()
        built[name].step(batch, clocks[name].mark)

    timed = interleaved_seconds({n: lambda n=n: step(n) for n in built}, args.repeats, device)
    rows = []
    for name, contestant in built.items():
        seconds, spread = median_spread(timed[name])
        state = contestant.state_bytes()
        peak = peak_resident_bytes(lambda name=name: step(name), device)
        rows.append({
            "impl": name, "step_s": seconds, "spread": spread, "tokens_per_s": args.tokens / seconds,
            "flops_per_token": contestant.flops_per_token, "trained_parameters": contestant.num_trained(),
            "peak_bytes": largest(state + peak), "state_bytes": largest(state),
            **{f"{phase}_s": median_spread(clocks[name].seconds[phase][1:-1])[0] for phase in PHASES},
        })  # fmt: skip
    peak_flops = known_peak(device)
    for row in rows:
        row["mfu"] = peak_flops and row["tokens_per_s"] * row["flops_per_token"] / (args.ranks * peak_flops)
        row["tokens_per_s_over_dense"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        row["limit"] = rows[0]["flops_per_token"] / row["flops_per_token"]
    return rows


def known_peak(device: torch.device) -> float | None:
    """The bf16 FLOP/s of a GPU that `lamella plan` knows, by its longest name there that the device's contains."""
    if device.type == "cpu":
        return None
    name = torch.cuda.get_device_name(device)
    known = [gpu for gpu in GPUS if gpu in name]
    return GPUS[max(known, key=len)][0] if known else None


def largest(value: int) -> int:
    """Over the ranks."""
    tensor = torch.tensor(float(value), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def show(args: argparse.Namespace, rows: list[dict[str, Any]], dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    title = (
        f"{args.shape}, {shape_of(args).layers} layers, {args.home} home, {name}, {args.ranks} ranks, "
        f"{args.tokens} tokens a step in samples of {args.seq_len}, "
        f"activation checkpointing {args.activation_checkpointing}, reshard {args.reshard}"
    )
    header = ["model", "step s", "+-", "tokens/s", "over dense", "limit", "peak GiB", *PHASES, "trained M"]
    table = [
        [
            r["impl"], f"{r['step_s']:.3f}", f"{r['spread']:.0%}", f"{r['tokens_per_s']:,.0f}",
            f"{r['tokens_per_s_over_dense']:.2f}x", f"{r['limit']:.2f}x", f"{r['peak_bytes'] / 2**30:.2f}",
            *(f"{r[f'{phase}_s']:.3f}" for phase in PHASES), f"{r['trained_parameters'] / 1e6:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    print_table(title, header, table)


def worker(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(args.threads or max(1, len(os.sched_getaffinity(0)) // args.ranks))
        if args.home == "torchtitan":
            from lamella.train.stage import return_freed_memory

            return_freed_memory()  # as training does; it holds for all models here
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = measure(args, device, dtype)
    if dist.get_rank() == 0:
        show(args, rows, dtype)
        settings = {"dtype": str(dtype), "shape": shape_of(args)._asdict()}
        settings |= {
            key: getattr(args, key)
            for key in ("home", "ranks", "tokens", "seq_len", "activation_checkpointing", "reshard")
        }
        write_json(args.json, {**provenance(device), **settings, "rows": rows})
    dist.barrier()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=[*SHAPES], default="8b-layers" if gpu else "smollm2")
    parser.add_argument("--layers", type=positive, help="this many layers in place of the shape's")
    parser.add_argument("--ranks", type=positive, default=1)
    parser.add_argument("--tokens", type=positive, default=16384 if gpu else 1024, help="of one step, over all ranks")
    parser.add_argument("--seq-len", type=positive, default=2048 if gpu else 256)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--home", choices=["torchtitan", "transformers"], help="default: torchtitan where it is")
    parser.add_argument("--activation-checkpointing", choices=["none", "selective", "full"], default="none")
    parser.add_argument("--reshard", choices=["default", "always", "never"], default="default", help="after forward")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of a rank (default: its share of the cores)")
    parser.add_argument("--only", default="", help="beside the first, models whose name matches this expression")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.tokens % (args.seq_len * args.ranks):
        parser.error(f"--tokens must be a multiple of --seq-len times --ranks, {args.seq_len * args.ranks}")
    args.home = args.home or ("torchtitan" if has_torchtitan() else "transformers")
    return args


def main() -> None:
    args = parse()
    if "RANK" in os.environ:
        worker(args)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    sys.exit(subprocess.call([*torchrun, __file__, *sys.argv[1:]]))


if __name__ == "__main__":
    main()
