"""How a recipe lays the weights of a model over the ranks, and in what precision they are computed with.

Shapes: T tokens of a micro-batch of one rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from lamella.architecture.moe_tensors import is_frozen
from lamella.architecture.names import is_trained, stays_in_model
from lamella.plan.model import DTYPE_BYTES, Model, Weight
from lamella.recipe.training import Recipe

MASTER_BYTES = 4
"""What trains and sums of gradients are float32."""
Device = Literal["gpu", "cpu"]


@dataclass(frozen=True)
class Layout:
    """One run's weights, laid over its ranks. The ranks of a stage are alike but for padding, which is counted at the
    fullest."""

    model: Model
    recipe: Recipe
    num_ranks: int
    device: Device
    teacher: Model | None = None
    """The model that is learned from is held beside the trained one."""
    stage: int = 0
    """The stage of the pipeline that is looked at."""

    def stages(self) -> list[Layout]:
        """One for each stage of the pipeline; itself where there is none."""
        return [replace(self, stage=stage) for stage in range(self.recipe.parallel.pipeline)]

    def of_teacher(self, teacher: Model) -> Layout:
        """Laid over the ranks like the model, but that nothing trains or is saved and frozen weights are shared out."""
        still = {"trains": "nothing", "objective": "pretrain", "frozen_weights": "sharded", "checkpoint_async": False}
        return replace(self, model=teacher, teacher=None, recipe=self.recipe.model_copy(update=still))

    @property
    def distils(self) -> bool:
        return self.recipe.objective == "distil"

    @property
    def is_stage(self) -> bool:
        """Whether the pipeline has other stages."""
        return self.recipe.parallel.pipeline > 1

    @property
    def has_head(self) -> bool:
        return self.stage == self.recipe.parallel.pipeline - 1

    @property
    def neighbours(self) -> int:
        """Stages that send it something."""
        return (self.stage > 0) + (not self.has_head)

    @property
    def layers(self) -> range:
        """The layers of the stage."""
        return self.recipe.parallel.layers_of(self.stage, self.model.num_layers)

    def weights(self) -> list[Weight]:
        """The weights of the stage."""
        return self._weights

    @cached_property
    def _weights(self) -> list[Weight]:
        def is_here(weight: Weight) -> bool:
            if weight.layer is None:
                return self.stage == 0 if weight.is_embedding else self.has_head
            return weight.layer in self.layers

        return [weight for weight in self.model.weights() if is_here(weight)]

    @property
    def shards(self) -> int:
        """Ranks among which FSDP cuts a weight, or its part."""
        parallel = self.recipe.parallel
        return self.num_ranks // (parallel.replicate * parallel.tensor * parallel.pipeline)

    @property
    def batch_ranks(self) -> int:
        return self.recipe.parallel.batch_ranks(self.num_ranks)

    @property
    def compute_bytes(self) -> int:
        """The bytes of a number that is computed with: of activations and of gathered weights."""
        precision = self.recipe.precision
        if precision == "auto":
            precision = "bfloat16" if self.device == "gpu" else "float32"
        return DTYPE_BYTES[precision]

    @property
    def moment_bytes(self) -> int:
        """The bytes of a number of one of AdamW's two moments."""
        return DTYPE_BYTES[self.recipe.optimizer.states]

    @property
    def replicates_frozen(self) -> bool:
        if self.recipe.frozen_weights == "auto":
            return self.device == "cpu" and self.compute_bytes == 4
        return self.recipe.frozen_weights == "replicated"

    @property
    def attention(self) -> str:
        """sdpa, flex or varlen"""
        return (
            ("flex" if self.device == "gpu" else "sdpa") if self.recipe.attention == "auto" else self.recipe.attention
        )

    @property
    def tokens(self) -> int:
        """T: tokens of one rank's micro-batch. Under tensor parallelism all tokens of the group go through a rank's
        heads and vocabulary, but through its part of them: the same in bytes."""
        parallel = self.recipe.parallel
        return self.recipe.samples_per_micro_batch * self.recipe.seq_len // (parallel.context * parallel.tensor)

    @property
    def residual_bytes(self) -> int:
        """The bytes of the activations between two layers."""
        return self.tokens * self.model.D * self.compute_bytes

    @property
    def micro_batches(self) -> int:
        """The micro-batches of one rank and step."""
        return self.recipe.samples_per_step // (self.recipe.samples_per_micro_batch * self.batch_ranks)

    @property
    def micro_batches_in_flight(self) -> int:
        """Computed forwards and not yet backwards (schedule 1F1B)."""
        return min(self.micro_batches, self.recipe.parallel.pipeline - self.stage)

    @property
    def bubble(self) -> float:
        """Share of a step in which a rank waits for other stages: (p - 1) / (m + p - 1) for p stages and m
        micro-batches (GPipe, arXiv 1811.06965)."""
        waits = self.recipe.parallel.pipeline - 1
        return waits / (self.micro_batches + waits)

    def trains(self, weight: Weight) -> bool:
        return is_trained(weight.name, self.recipe.trains)

    def waits(self, weight: Weight) -> bool:
        """Whether a GPU's rank keeps its part of the weight in main memory."""
        offload = self.recipe.offload
        return offload == "cpu" or (offload == "frozen" and is_frozen(weight.name))

    def is_whole(self, weight: Weight) -> bool:
        """Whether FSDP leaves the weight whole on every rank; expert parallelism may still share it out."""
        return self.replicates_frozen and not self.trains(weight)

    def part_numel(self, weight: Weight) -> int:
        """Numbers of the weight that a rank computes with: all, or its experts."""
        if weight.is_expert:
            return weight.numel // self.recipe.parallel.expert
        is_cut = len(weight.shape) > 1 and ".moe." not in weight.name
        return weight.numel // (self.recipe.parallel.tensor if is_cut else 1)

    def shard_numel(self, weight: Weight) -> int:
        """Numbers that the fullest rank keeps. FSDP cuts rows."""
        if self.is_whole(weight):
            return self.part_numel(weight)
        rows, cuts = weight.shape[0], self.shards
        if weight.is_expert:  # a matrix with the rows of all experts
            rows, cuts = rows * weight.shape[1] // self.recipe.parallel.expert, self._expert_cuts
        return math.ceil(rows / cuts) * (self.part_numel(weight) // rows)

    @property
    def _expert_cuts(self) -> int:
        """Ranks among which FSDP cuts a rank's experts."""
        parallel = self.recipe.parallel
        return self.shards if parallel.expert == 1 else self.shards * parallel.tensor // parallel.expert

    def stays_in_model(self, weight: Weight) -> bool:
        """Whether checkpoints leave it out, as it is what the model's file says."""
        return stays_in_model(weight.name, self.recipe.trains)

    def held_bytes(self, weight: Weight) -> int:
        """Of a rank's shard: float32 for what trains, half of it for what does not where the file or, for whole
        weights, the computation is in half precision."""
        if not self.stays_in_model(weight):
            return self.shard_numel(weight) * (self.compute_bytes if self.is_whole(weight) else MASTER_BYTES)
        in_file = DTYPE_BYTES[self.model.dtype]
        return self.shard_numel(weight) * (self.compute_bytes if self.is_whole(weight) or in_file == 4 else in_file)

    def gathered_bytes(self, weights: list[Weight]) -> int:
        """The bytes of an FSDP group's weights while it is computed; those that are whole are there already."""
        return self.compute_bytes * sum(self.part_numel(w) for w in weights if not self.is_whole(w))
