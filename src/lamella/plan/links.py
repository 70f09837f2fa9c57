"""The bytes that one rank receives in an optimizer step, over the fast links inside of a node and over the network, and
those that its GPU and main memory exchange.

Ranks are numbered as torchtitan lays them out: pipeline outermost, then replicate, shard, context, tensor; a node holds
consecutive ones. A collective of s ranks, of which m lie in each node, brings a rank all parts but its own: the others'
nodes send each part into a node once, shared out over its m ranks (as NCCL's rings do), and the rest comes from
neighbours inside of the node.

What moves, for weights of B bytes in the dtype they are computed with, G bytes of gradients in float32, T tokens of a
rank's micro-batch, width D, b bytes a number:

    gathering weights      B, once in the forward and once in the backward pass of each micro-batch (once a step where a
                           pipeline keeps them); nothing of weights that each rank holds whole
    summing gradients      G over the ranks that cut a weight, each micro-batch or once a step (`gradient_sync`), then
                           2 G/s over the copies (`replicate`), once a step
    experts                see `lamella.moe.expert_parallel`: 2 (P-1) T D b forwards and as much backwards
    context                keys and values, gathered forwards and summed backwards
    tensor                 tokens gathered and outputs summed, for attention and for dense FFNs
    pipeline               activations forwards, gradients backwards
    main memory            the rank's part of what waits there, as it is held, for each gathering; of what trains, the
                           part of the summed gradients on the way back
"""

from __future__ import annotations

from dataclasses import dataclass

from lamella.plan.layout import MASTER_BYTES, Layout
from lamella.plan.model import Weight

RANKS_PER_NODE = 8


@dataclass(frozen=True)
class Traffic:
    """Bytes that the rank with the most to receive gets in a step."""

    inside: float = 0.0
    """Over the links inside of a node."""
    network: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.network + other.network)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.inside * times, self.network * times)


@dataclass(frozen=True)
class Group:
    """Ranks of one collective: `size` of them, `stride` apart."""

    size: int
    stride: int

    def gather(self, num_bytes: float, per_node: int) -> Traffic:
        """Of an all-gather (or a reduce-scatter) whose parts come to `num_bytes` together."""
        inside = max(1, min(self.size, per_node // self.stride))
        received = num_bytes * (self.size - 1) / self.size
        network = num_bytes * (1 - inside / self.size) / inside
        return Traffic(received - network, network)


@dataclass(frozen=True)
class Step:
    """What moves in an optimizer step, by what the ranks wait for it."""

    weights: Traffic
    """Weights and gradients: while layers are computed."""
    activations: Traffic
    """Tokens, keys, and what stages hand on: the next operation waits."""
    fetched: float = 0.0
    """Bytes from main memory over PCI Express: weights that wait there."""
    returned: float = 0.0
    """Bytes to main memory: their gradients."""

    @property
    def all(self) -> Traffic:
        """Both."""
        return self.weights + self.activations


def step_traffic(layout: Layout, per_node: int = RANKS_PER_NODE) -> Step:
    """The bytes of the stage with most of them."""
    stages = [_stage_traffic(stage, per_node) for stage in layout.stages()]
    return max(stages, key=lambda step: (step.all.network, step.all.inside, step.fetched + step.returned))


def sums_in_step(layout: Layout) -> int:
    """How often a step sums the gradients over the ranks that cut a weight."""
    return 1 if layout.is_stage or layout.recipe.gradient_sync == "step" else layout.micro_batches


def _stage_traffic(stage: Layout, per_node: int) -> Step:
    weights = Traffic()
    gathers = 1 if stage.is_stage else 2 * stage.micro_batches
    sums = sums_in_step(stage)
    waiting = [w for w in stage.weights() if stage.waits(w)]
    fetched = gathers * sum(stage.held_bytes(w) for w in waiting)
    returned = sums * MASTER_BYTES * sum(stage.shard_numel(w) for w in waiting if stage.trains(w))
    for shards, held in _by_group(stage):
        computed = stage.compute_bytes * sum(stage.part_numel(w) for w in held if not stage.is_whole(w))
        summed = MASTER_BYTES * sum(stage.part_numel(w) for w in held if stage.trains(w))
        copies = Group(stage.recipe.parallel.replicate, shards.size * shards.stride)
        weights += shards.gather(computed, per_node) * gathers
        weights += shards.gather(summed, per_node) * sums + copies.gather(summed / shards.size, per_node) * 2
    return Step(weights, _activations(stage, per_node) * stage.micro_batches, fetched, returned)


def _by_group(stage: Layout) -> list[tuple[Group, list[Weight]]]:
    """The ranks among which FSDP cuts them, and the weights."""
    parallel, weights = stage.recipe.parallel, stage.weights()
    plain, expert = Group(stage.shards, parallel.tensor), Group(stage.shards * parallel.tensor // parallel.expert, 1)
    if parallel.expert == 1:
        return [(plain, weights)]
    expert = Group(expert.size, parallel.expert)
    return [(plain, [w for w in weights if not w.is_expert]), (expert, [w for w in weights if w.is_expert])]


def _activations(stage: Layout, per_node: int) -> Traffic:
    """Of one micro-batch."""
    parallel, model = stage.recipe.parallel, stage.model
    passes = 3 if stage.recipe.activation_checkpointing == "full" else 2
    found = Traffic()
    for layer in stage.layers:
        moe = model.moe_of(layer)
        if moe is not None and parallel.expert > 1:
            everyones = stage.residual_bytes * parallel.expert
            found += Group(parallel.expert, 1).gather(everyones, per_node) * (2 * passes)
        if parallel.context > 1:
            keys = 2 * model.G * model.H * stage.tokens * parallel.context * stage.compute_bytes
            found += Group(parallel.context, parallel.tensor).gather(keys, per_node) * passes
        if parallel.tensor > 1:
            blocks = 1 if moe is not None else 2
            tokens = stage.residual_bytes * parallel.tensor
            found += Group(parallel.tensor, 1).gather(tokens, per_node) * (2 * passes * blocks)
    if stage.is_stage:
        apart = stage.num_ranks // parallel.pipeline >= per_node
        handed = stage.residual_bytes * stage.neighbours
        found += Traffic(0.0, handed) if apart else Traffic(handed, 0.0)
    return found
