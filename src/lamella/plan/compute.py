"""Tokens, FLOPs, time and cost of a run."""

from __future__ import annotations

from lamella.errors import UserError, did_you_mean
from lamella.plan.layout import Layout
from lamella.plan.model import Weight

ASSUMED_MFU = 0.30
"""Model FLOPs utilisation where no speed was measured: usual for mixtures of experts on such GPUs, not a promise."""
DEFAULT_GPU = "H100"
# name -> (dense bfloat16 FLOP/s, memory in bytes), from the makers' data sheets
GPUS: dict[str, tuple[float, float]] = {
    "A100-40GB": (312e12, 40e9),
    "A100": (312e12, 80e9),
    "L40S": (362e12, 48e9),
    "H100": (989e12, 80e9),
    "H200": (989e12, 141e9),
    "B200": (2250e12, 180e9),
    "RTX4090": (165e12, 24e9),
}


def gpu(name: str) -> tuple[float, float]:
    """(peak FLOP/s, memory bytes); UserError for one that is not in the table."""
    if name not in GPUS:
        raise UserError(f"no figures for the GPU {name!r}{did_you_mean(name, GPUS)}; known: {', '.join(GPUS)}")
    return GPUS[name]


def active_part(layout: Layout, weight: Weight) -> float:
    """Share of the weight that one token meets."""
    moe = None if weight.layer is None else layout.model.moe_of(weight.layer)
    return moe.num_experts_per_tok / moe.num_experts if moe is not None and weight.is_expert else 1.0


def flops_per_token(layout: Layout) -> int:
    """Training FLOPs, as `lamella.titan.flops` counts them for the MFU that a run reports."""
    model, flops = layout.model, 0.0
    for weight in layout.model.weights():
        if _is_multiplied(layout, weight):
            flops += active_part(layout, weight) * weight.numel * (6 if layout.trains(weight) else 4)
    flops = int(flops + 12 * model.num_layers * model.N * model.H * layout.recipe.seq_len)
    if layout.distils:
        flops += _forward_flops(layout if layout.teacher is None else layout.of_teacher(layout.teacher))
    return flops


def _forward_flops(layout: Layout) -> int:
    model = layout.model
    weights = [weight for weight in model.weights() if _is_multiplied(layout, weight)]
    products = 2 * sum(active_part(layout, weight) * weight.numel for weight in weights)
    return int(products) + 4 * model.num_layers * model.N * model.H * layout.recipe.seq_len


def _is_multiplied(layout: Layout, weight: Weight) -> bool:
    """Whether tokens are multiplied with the weight; an embedding that is no head is only looked up."""
    return len(weight.shape) >= 2 and (layout.model.tied or not weight.is_embedding)


def tokens_per_s(layout: Layout, gpu_name: str) -> float:
    """The tokens per second of all ranks, at the assumed utilisation of the time in which they do not wait for
    others."""
    return ASSUMED_MFU * (1 - layout.bubble) * gpu(gpu_name)[0] * layout.num_ranks / flops_per_token(layout)
