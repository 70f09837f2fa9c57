"""Run: uv run benchmarks/experts.py [--shape 1k] [--device cuda] [--json FILE]

One MoE FFN layer, forward and forward+backward, beside the dense FFN that it came from and beside other
implementations with the same weights and the same routing, in one run. Floor of a twin step whose frozen half takes
no weight gradient: 2.5/3 of the dense one's matrix products.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))  # runs where lamella is not installed, too

from measure import interleaved_seconds, median_spread, peak_bytes, positive, print_table, provenance, write_json

from lamella.architecture.moe import MoEConfig
from lamella.moe.experts import PATHS, MoEWeights, Resident, moe_ffn
from lamella.moe.packed import Experts

# name -> (tokens T, model width D, dense FFN width F)
SHAPES = {"tiny": (512, 256, 1024), "1k": (2048, 1024, 4096), "2k": (1024, 2048, 8192), "8b": (1024, 4096, 14336)}
GPU_TOKENS = 16384
SLICES = 8


@dataclasses.dataclass
class Layer:
    """The weights and the input that every implementation gets."""

    x_TD: Tensor
    dy_TD: Tensor
    router_SD: Tensor
    bias_S: Tensor
    frozen: Experts
    trainable: Experts
    config: MoEConfig


def make_layer(T: int, D: int, F_: int, device: torch.device, dtype: torch.dtype) -> Layer:
    torch.manual_seed(0)
    f = F_ // SLICES
    config = MoEConfig(SLICES, SLICES, f, SLICES, (0,), route_scale=float(SLICES))

    def random(*shape: int, std: float, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * std

    def experts() -> Experts:
        return Experts(random(SLICES, 2 * f, D, std=D**-0.5), random(SLICES, D, f, std=F_**-0.5))

    return Layer(
        random(T, D, std=1), random(T, D, std=1), random(SLICES, D, std=D**-0.5),
        torch.zeros(SLICES, device=device), experts(), experts(), config,
    )  # fmt: skip


Implementation = tuple[Callable[[Tensor], Tensor], list[Tensor]]
"""(forward, the leaves that train)"""


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def dense(layer: Layer) -> Implementation:
    """The FFN of the same active width, training all its weights."""
    f, D = layer.config.moe_intermediate_size, layer.x_TD.shape[1]
    gate_up = layer.trainable.gate_up_proj.view(SLICES, 2, f, D)
    gate, up = leaf(gate_up[:, 0].reshape(-1, D)), leaf(gate_up[:, 1].reshape(-1, D))
    down = leaf(layer.trainable.down_proj.transpose(0, 1).reshape(D, -1))
    return lambda x: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down), [gate, up, down]


def ours(layer: Layer, path: str) -> Implementation:
    trainable = Experts(*map(leaf, layer.trainable))
    router = leaf(layer.router_SD)
    weights = MoEWeights(router, layer.bias_S, Resident(layer.frozen, trainable))
    return (
        lambda x: moe_ffn(x, weights, layer.config, "routed", path)[0],  # type: ignore[arg-type]
        [*trainable, router],
    )


def all_experts(layer: Layer) -> Implementation:
    """Every expert for every token, unchosen ones weighted 0."""
    gate_up = leaf(torch.cat([layer.frozen.gate_up_proj, layer.trainable.gate_up_proj]))
    down = leaf(torch.cat([layer.frozen.down_proj, layer.trainable.down_proj]))
    router = leaf(_mirrored(layer.router_SD))

    def forward(x: Tensor) -> Tensor:
        scores = F.linear(x.float(), router.float()).sigmoid()
        chosen = scores.topk(SLICES, dim=-1).indices
        weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
        weights = (weights / weights.sum(-1, keepdim=True) * SLICES).to(x.dtype)
        gate, up = torch.einsum("td,efd->tef", x, gate_up).chunk(2, dim=-1)
        return torch.einsum("tef,edf->td", F.silu(gate) * up * weights[..., None], down)

    return forward, [gate_up, down, router]


def _mirrored(router_SD: Tensor) -> Tensor:
    return torch.cat([-router_SD, router_SD])


def transformers_block(layer: Layer, family: str, implementation: str) -> Implementation:
    from transformers import AutoConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    D, f = layer.x_TD.shape[1], layer.config.moe_intermediate_size
    common = {"hidden_size": D, "num_experts_per_tok": SLICES}
    if family == "glm4_moe":
        config = AutoConfig.for_model(
            family, **common, moe_intermediate_size=f, n_routed_experts=2 * SLICES, n_shared_experts=1, n_group=1,
            topk_group=1, routed_scaling_factor=float(SLICES), norm_topk_prob=True,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(family, **common, intermediate_size=f, num_local_experts=2 * SLICES)
    config._experts_implementation = implementation
    with torch.device(layer.x_TD.device):
        block = (Glm4MoeMoE if family == "glm4_moe" else MixtralSparseMoeBlock)(config)
    block.experts.gate_up_proj = nn.Parameter(torch.cat([layer.frozen.gate_up_proj, layer.trainable.gate_up_proj]))
    block.experts.down_proj = nn.Parameter(torch.cat([layer.frozen.down_proj, layer.trainable.down_proj]))
    block.gate.weight = nn.Parameter(_mirrored(layer.router_SD))
    if family == "glm4_moe":
        block.gate.e_score_correction_bias.zero_()
        block.shared_experts = nn.Module()
        block.shared_experts.forward = lambda x: 0.0  # no shared expert: only the routed ones are compared

    def forward(x: Tensor) -> Tensor:
        y = block(x[None])
        return (y[0] if isinstance(y, tuple) else y)[0]

    return forward, [block.experts.gate_up_proj, block.experts.down_proj, block.gate.weight]


def torchtitan_block(layer: Layer) -> Implementation:
    """torchtitan's MoE, which computes its experts in bf16 whatever the parameters' dtype."""
    from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config

    import lamella.titan  # noqa: F401  lets torchtitan run without an accelerator

    D, f = layer.x_TD.shape[1], layer.config.moe_intermediate_size
    init = {"weight": nn.init.zeros_}
    E = 2 * SLICES
    with torch.device(layer.x_TD.device):
        block = make_moe_config(
            num_experts=E,
            load_balance_coeff=1e-3,
            router=make_router_config(
                dim=D, num_experts=E, gate_param_init=init, top_k=SLICES, score_func="sigmoid", route_norm=True,
                route_scale=float(SLICES),
            ),
            routed_experts=make_routed_experts_config(
                dim=D, hidden_dim=f, num_experts=E, top_k=SLICES, comm_backend="standard",
                param_init=dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), nn.init.zeros_),
            ),
        ).build()  # fmt: skip
    experts = block.routed_experts.inner_experts
    gate_up = torch.cat([layer.frozen.gate_up_proj, layer.trainable.gate_up_proj])
    experts.w1_EFD = nn.Parameter(gate_up[:, :f].clone())
    experts.w3_EFD = nn.Parameter(gate_up[:, f:].clone())
    experts.w2_EDF = nn.Parameter(torch.cat([layer.frozen.down_proj, layer.trainable.down_proj]))
    block.router.gate.weight = nn.Parameter(_mirrored(layer.router_SD))
    block.expert_bias_E.zero_()
    return lambda x: block(x[None])[0], [experts.w1_EFD, experts.w2_EDF, experts.w3_EFD, block.router.gate.weight]


def implementations(layer: Layer) -> dict[str, Callable[[], Implementation]]:
    peers: dict[str, Callable[[], Implementation]] = {
        "dense FFN": lambda: dense(layer),
        "lamella auto": lambda: ours(layer, "auto"),
    }
    for path in PATHS:
        if path == "fused" and layer.x_TD.device.type == "cpu":
            continue  # Triton kernels
        peers[f"lamella {path}"] = lambda path=path: ours(layer, path)
    for family in ("glm4_moe", "mixtral"):
        for kind in ("eager", "grouped_mm"):
            peers[f"transformers {family} {kind}"] = lambda family=family, kind=kind: transformers_block(
                layer, family, kind
            )
    peers["torchtitan MoE"] = lambda: torchtitan_block(layer)
    peers["every expert, einsum"] = lambda: all_experts(layer)
    return peers


def build(layer: Layer) -> dict[str, Implementation]:
    built = {}
    for name, make in implementations(layer).items():
        try:
            built[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})")
    return built


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
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, repeats: int, only: str | None
) -> list[dict]:
    layer = make_layer(*shape, device, dtype)
    built = {n: i for n, i in build(layer).items() if only is None or n in ("dense FFN", "lamella loop") or only in n}
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
    return rows


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
    parser.add_argument("--only", help="implementations whose name contains this")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    names = [*SHAPES] if args.shape == "all" else [args.shape or ("8b" if gpu else "1k")]
    results = []
    for name in names:
        T, D, F_ = SHAPES[name]
        shape = (args.tokens or (GPU_TOKENS if gpu else T), D, F_)
        rows = run(shape, device, dtype, args.repeats, args.only)
        show(shape, rows, dtype)
        keys = {"name": name, "tokens": shape[0], "hidden_size": D, "intermediate_size": F_, "slices": SLICES}
        results.append({**provenance(device), "dtype": str(dtype).removeprefix("torch."), "shape": keys, "rows": rows})
    write_json(args.json, results[0] if len(results) == 1 else results)


if __name__ == "__main__":
    main()
