"""How long a step takes at best: the time of its products, of what memory is too slow for, and of what moves.

Products run at a share of the peak that good kernels reach (SHARE); what is done element by element takes the bytes it
reads and writes over the memory's rate; weights and gradients move while layers are computed, and cost what they take
longer than that; tokens that move are waited for. So is what FSDP copies while nothing computes: weights from main
memory on a rank alone, and gradients to main memory where others are there, to which the CPU adds them. No figure of
these was measured with lamella: a run's own `mfu` overrules them.

Shapes: T tokens of a micro-batch, D model width, F FFN width, N heads, H head width, L tokens of a sample, K active
experts, f neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from lamella.plan.compute import GPUS, active_part, flops_per_token, gpu
from lamella.plan.layout import Layout
from lamella.plan.links import RANKS_PER_NODE, Step, Traffic, step_traffic, sums_in_step
from lamella.plan.model import Weight

SHARE = {"dense": 0.70, "experts": 0.50, "attention": 0.45}
"""Of the peak. dense: cuBLAS at these widths; experts: Triton's grouped products on H100, by their instructions, where
peers publish 0.57 to 0.66; attention: forwards and backwards together."""
MEMORY_RATE = {
    "A100-40GB": 1.555e12, "A100": 2.039e12, "L40S": 0.864e12, "H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12,
    "RTX4090": 1.008e12,
}  # fmt: skip
"""Bytes a second, from the makers' data sheets."""
LINK_RATE = {
    "A100-40GB": 300e9, "A100": 300e9, "L40S": 32e9, "H100": 450e9, "H200": 450e9, "B200": 900e9, "RTX4090": 32e9,
}  # fmt: skip
"""Bytes a second that a GPU receives inside of a node: NVLink in one direction, or PCI Express 4 x16."""
MAIN_MEMORY_LINK_RATE = {
    "A100-40GB": 32e9, "A100": 32e9, "L40S": 32e9, "H100": 64e9, "H200": 64e9, "B200": 64e9, "RTX4090": 32e9,
}  # fmt: skip
"""Bytes a second between a GPU and main memory, in one direction: PCI Express 4 or 5, x16."""
MAIN_MEMORY_RATE = 77e9
"""Bytes a second that main memory reads and writes for one rank: two sockets of 8 channels DDR5-4800, shared by 8."""
ADDED_BYTES = 12
"""Read and written in main memory for a gradient that is added to another."""
NETWORK_RATE = 50e9
"""Bytes a second and GPU between nodes: one network card of 400 Gbit/s for each."""
LINK_SHARE = 0.75
"""Of these rates collectives of large messages reach about so much."""
RESIDUAL_PASSES = 24
"""Times that T x D numbers are read or written outside of products in a layer's forward and backward pass together:
two norms, two sums, rope and what attention takes and gives; compiled."""
ROW_PASSES = (6, 16)
"""Likewise of routed rows, of width D and of width f: outputs of experts written and summed up, gate and up, their
product, and the gradients of all."""
OPTIMIZER_BYTES = 36
"""Read and written for a trained weight: AdamW's weight, gradient and two moments (28), and the norm (8)."""


@dataclass(frozen=True)
class Roofline:
    """Seconds of one optimizer step of the slowest stage."""

    products_s: float
    memory_s: float
    recomputed_s: float
    waited_s: float
    """For tokens that move, for weights that take longer than the layers, and for copies that nothing hides."""
    bubble: float
    mfu: float
    traffic: Step

    @property
    def step_s(self) -> float:
        """The whole step."""
        return (self.products_s + self.memory_s + self.recomputed_s + self.waited_s) / (1 - self.bubble)


def roofline(layout: Layout, gpu_name: str, per_node: int = RANKS_PER_NODE) -> Roofline:
    """The best that a step can be expected to take."""
    traffic = step_traffic(layout, per_node)
    stages = [_stage(stage, gpu_name, traffic) for stage in layout.stages()]
    slowest = max(stages, key=lambda stage: stage.step_s)
    tokens = layout.recipe.samples_per_step * layout.recipe.seq_len
    mfu = flops_per_token(layout) * tokens / (layout.num_ranks * gpu(gpu_name)[0] * slowest.step_s)
    return Roofline(**{**vars(slowest), "mfu": mfu})


def _stage(stage: Layout, gpu_name: str, traffic: Step) -> Roofline:
    peak, times = gpu(gpu_name)[0], stage.micro_batches
    forward, backward = (times * seconds for seconds in _products(stage, peak))
    touched = sum(_touched(stage, layer) for layer in stage.layers) * times / MEMORY_RATE[gpu_name]
    trained = [w for w in stage.weights() if stage.trains(w)]
    there = sum(stage.shard_numel(w) for w in trained if stage.waits(w))
    here = sum(stage.shard_numel(w) for w in trained) - there
    again = {"full": 1.0, "selective": 0.5, "none": 0.0}[stage.recipe.activation_checkpointing]
    computed = forward + backward + touched * (1 + again / 3) + forward * again
    link, added = MAIN_MEMORY_LINK_RATE[gpu_name] * LINK_SHARE, sums_in_step(stage) - 1
    fetched, alone = traffic.fetched / link, stage.shards == 1
    moved = max(_seconds(traffic.weights, gpu_name), 0.0 if alone else fetched)
    waited = _seconds(traffic.activations, gpu_name) + max(0.0, moved - computed) + (fetched if alone else 0.0)
    waited += added / (added + 1) * traffic.returned / link
    memory = touched + OPTIMIZER_BYTES * here / MEMORY_RATE[gpu_name]
    memory += (OPTIMIZER_BYTES + ADDED_BYTES * added) * there / (MAIN_MEMORY_RATE * LINK_SHARE)
    recomputed = again * (forward + touched / 3)
    return Roofline(forward + backward, memory, recomputed, waited, stage.bubble, 0.0, traffic)


def _products(stage: Layout, peak: float) -> tuple[float, float]:
    """Seconds of the matrix products and of attention of one micro-batch, forwards and backwards."""
    model, T, recipe = stage.model, stage.tokens, stage.recipe
    forward = backward = 0.0
    for weight in stage.weights():
        if len(weight.shape) < 2 or (weight.is_embedding and not (model.tied and stage.has_head)):
            continue
        # all tokens of a tensor group meet a rank's part of a weight: as many operations as its tokens meet all of it
        seconds = 2 * T * active_part(stage, weight) * weight.numel / (peak * SHARE[_kind(weight)])
        forward += seconds
        backward += seconds * (2 if stage.trains(weight) else 1)
    # causal: half of the pairs; backwards five products for the forward's two
    attention = 2 * model.N * model.H * T * recipe.seq_len * len(stage.layers) / (peak * SHARE["attention"])
    return forward + attention, backward + 2.5 * attention


def _kind(weight: Weight) -> str:
    return "experts" if weight.is_expert else "dense"


def _touched(stage: Layout, layer: int) -> float:
    """Bytes read and written outside of products in a layer, forwards and backwards."""
    model, T, b = stage.model, stage.tokens, stage.compute_bytes
    moe = model.moe_of(layer)
    found = RESIDUAL_PASSES * T * model.D * b
    if moe is None:
        return found + ROW_PASSES[1] * T * model.F * b
    rows = T * moe.num_experts_per_tok
    return found + rows * b * (ROW_PASSES[0] * model.D + ROW_PASSES[1] * moe.moe_intermediate_size)


def _seconds(traffic: Traffic, gpu_name: str) -> float:
    """Both kinds of links work at the same time."""
    inside, network = LINK_RATE[gpu_name] * LINK_SHARE, NETWORK_RATE * LINK_SHARE
    return max(traffic.inside / inside, traffic.network / network)


assert GPUS.keys() == MEMORY_RATE.keys() == LINK_RATE.keys() == MAIN_MEMORY_LINK_RATE.keys()
