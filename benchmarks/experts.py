"""Run: uv run benchmarks/experts.py [--shape 1k] [--device cuda] [--json FILE]

One MoE FFN layer, forward and forward+backward, beside the dense FFN that it came from and beside other
implementations with the same weights and the same routing, in one run. Floor of a twin step whose frozen half takes
no weight gradient: 2.5/3 of the dense one's matrix products.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from expert_peers import PEERS, SLICES, Implementation, Layer, dense, leaf, make_layer
from measure import interleaved_seconds, median_spread, peak_bytes, positive, print_table, provenance, write_json

from lamella.errors import UserError
from lamella.moe.experts import PATHS, MoEWeights, Resident, moe_ffn
from lamella.moe.packed import Experts

# name -> (tokens T, model width D, dense FFN width F)
SHAPES = {"tiny": (512, 256, 1024), "1k": (2048, 1024, 4096), "2k": (1024, 2048, 8192), "8b": (1024, 4096, 14336)}
GPU_TOKENS = 16384
BASE = ("dense FFN", "lamella loop")
"""Always measured: what the others are held against."""
PROBED_TOKENS = 256
WRONG = {"float32": 1e-3, "bfloat16": 3e-2}
"""A relative error of the output that is none of rounding: 2^-9 a product in bfloat16, a few of them in a row."""


def ours(layer: Layer, path: str) -> Implementation:
    trainable = Experts(*map(leaf, layer.trainable))
    router = leaf(layer.router_SD)
    weights = MoEWeights(router, layer.bias_S, Resident(layer.frozen, trainable))
    return (
        lambda x: moe_ffn(x, weights, layer.config, "routed", path)[0],  # type: ignore[arg-type]
        [*trainable, router],
    )


def implementations(layer: Layer) -> dict[str, Callable[[], Implementation]]:
    """The dense FFN, every path of lamella, and the peers."""
    made: dict[str, Callable[[], Implementation]] = {"dense FFN": lambda: dense(layer)}
    for path in ("auto", *PATHS):
        made[f"lamella {path}"] = lambda path=path: ours(layer, path)
    return made | {name: lambda make=make: make(layer) for name, make in PEERS.items()}


def build(layer: Layer, only: list[str]) -> tuple[dict[str, Implementation], list[dict[str, Any]]]:
    """(what runs here, what does not and why): each is tried on a few tokens, forwards and backwards."""
    built, left_out = {}, []
    for name, make in implementations(layer).items():
        if name not in BASE and only and not any(part in name.lower() for part in only):
            continue
        try:
            forward, leaves = make()
            forward(layer.x_TD[:PROBED_TOKENS].clone().requires_grad_()).backward(layer.dy_TD[:PROBED_TOKENS])
        except Exception as error:  # whatever a peer raises: it must not end the run
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            broken = name.startswith("lamella") and not isinstance(error, ImportError | UserError)
            left_out.append({"impl": name, "reason": reason, "broken": broken})
            print(f"left out: {name} ({reason})")
            continue
        for tensor in leaves:
            tensor.grad = None
        built[name] = (forward, leaves)
    return built, left_out


def check_same_function(built: dict[str, Implementation], x_TD: Tensor) -> dict[str, float]:
    """Relative error of each routed implementation's output to the loop oracle."""
    with torch.no_grad():
        oracle = built["lamella loop"][0](x_TD).float()
        return {
            n: ((f(x_TD).float() - oracle).norm() / oracle.norm()).item()
            for n, (f, _) in built.items()
            if n != "dense FFN"
        }


def run(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, repeats: int, only: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(a row of figures for each implementation, what was left out)"""
    layer = make_layer(*shape, device, dtype)
    built, left_out = build(layer, only)
    errors = check_same_function(built, layer.x_TD[:256])
    x_TD = layer.x_TD.clone().requires_grad_()

    def forward(name: str) -> None:
        with torch.no_grad():
            built[name][0](x_TD)

    def forward_backward(name: str) -> None:
        for parameter in (x_TD, *built[name][1]):
            parameter.grad = None
        built[name][0](x_TD).backward(layer.dy_TD)

    timed_f = interleaved_seconds({n: lambda n=n: forward(n) for n in built}, repeats, device)
    timed_fb = interleaved_seconds({n: lambda n=n: forward_backward(n) for n in built}, repeats, device)
    rows = []
    for name, (_, leaves) in built.items():
        for parameter in (x_TD, *leaves):
            parameter.grad = None
        peak = peak_bytes(lambda name=name: forward_backward(name), device)
        for parameter in (x_TD, *leaves):
            parameter.grad = None
        (f_s, f_spread), (fb_s, fb_spread) = median_spread(timed_f[name]), median_spread(timed_fb[name])
        rows.append({
            "impl": name, "forward_s": f_s, "forward_spread": f_spread, "forward_backward_s": fb_s,
            "forward_backward_spread": fb_spread, "peak_bytes": peak, "relative_error": errors.get(name),
        })  # fmt: skip
    base = rows[0]
    for row in rows:
        row["forward_over_dense"] = row["forward_s"] / base["forward_s"]
        row["forward_backward_over_dense"] = row["forward_backward_s"] / base["forward_backward_s"]
        row["peak_memory_over_dense"] = row["peak_bytes"] / base["peak_bytes"]
    return rows, left_out


def show(shape: tuple[int, int, int], rows: list[dict], dtype: torch.dtype) -> None:
    T, D, F_ = shape
    flops = 6 * T * D * F_
    title = (
        f"T {T}, D {D}, F {F_}, {str(dtype).removeprefix('torch.')}; dense forward "
        f"{flops / rows[0]['forward_s'] / 1e9:,.0f} GFLOP/s; floor of forward+backward 0.83x"
    )
    table = [
        [
            r["impl"], f"{r['forward_s'] * 1e3:.1f}", f"{r['forward_over_dense']:.2f}x", f"{r['forward_spread']:.0%}",
            f"{r['forward_backward_s'] * 1e3:.1f}", f"{r['forward_backward_over_dense']:.2f}x",
            f"{r['forward_backward_spread']:.0%}",
            f"{r['peak_bytes'] / 2**20:.0f}", f"{r['peak_memory_over_dense']:.2f}x",
            "-" if r["relative_error"] is None else f"{r['relative_error']:.0e}",
        ]
        for r in rows
    ]  # fmt: skip
    header = [
        "implementation",
        "fwd ms",
        "over dense",
        "+-",
        "fwd+bwd ms",
        "over dense",
        "+-",
        "peak MiB",
        "over dense",
        "rel. error",
    ]
    print_table(title, header, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default=None, help="default: 1k on a CPU, 8b on a GPU")
    parser.add_argument("--tokens", type=positive, help=f"default: the shape's on a CPU, {GPU_TOKENS} on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--only", nargs="+", default=[], help="implementations whose name contains one of these")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    names = [*SHAPES] if args.shape == "all" else [args.shape or ("8b" if gpu else "1k")]
    results, wrong = [], []
    for name in names:
        T, D, F_ = SHAPES[name]
        shape = (args.tokens or (GPU_TOKENS if gpu else T), D, F_)
        rows, left_out = run(shape, device, dtype, args.repeats, args.only)
        show(shape, rows, dtype)
        keys = {"name": name, "tokens": shape[0], "hidden_size": D, "intermediate_size": F_, "slices": SLICES}
        figures = {"shape": keys, "rows": rows, "left_out": left_out}
        results.append({**provenance(device), "dtype": str(dtype).removeprefix("torch."), **figures})
        wrong += [left["impl"] for left in left_out if left["broken"]]
        limit = WRONG[results[-1]["dtype"]]
        wrong += [r["impl"] for r in rows if r["impl"].startswith("lamella") and r["relative_error"] > limit]
    write_json(args.json, results[0] if len(results) == 1 else results)
    if wrong:
        sys.exit(f"wrong or broken: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
