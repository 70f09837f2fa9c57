"""Bytes that one rank needs, at each moment of a training step; the largest moment is what a device must have.

FSDP keeps a shard of every weight. It gathers a layer while the layer is computed, the next one already meanwhile,
and drops it afterwards. In the backward pass a layer's gradients lie there whole, then in float32 for the sum over
ranks; the previous layer's sum is still under way then (NCCL), or sums in a copy (gloo). Embedding, norm and head
have groups of their own; a tied pair stays gathered for the whole step.

A stage of a pipeline keeps what it gathered, and gradients whole, to the end of the step, and activations of as many
micro-batches as have gone on to the stages behind it. A teacher's forward pass comes before the model's.

An asynchronous save copies the rank's weights and moments to main memory, on ranks without a GPU too, and keeps the
room for the next save. A synchronous one copies a few tensors at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lamella.plan.activations import (
    block_bytes,
    kept_bytes,
    kl_bytes,
    logits_bytes,
    recomputed_bytes,
    teacher_logits_bytes,
    working_bytes,
)
from lamella.plan.layout import MASTER_BYTES, Layout
from lamella.plan.model import Weight


@dataclass(frozen=True)
class Moment:
    """A place in a step, and what lies in the device's memory there."""

    name: str
    parts: dict[str, int]
    """What it is -> bytes."""

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


def fullest(layout: Layout) -> Memory:
    """The memory of the stage that needs most."""
    return max((Memory(stage) for stage in layout.stages()), key=lambda memory: memory.peak().total_bytes)


class Memory:
    """The memory of one rank in each moment of an optimizer step after the first, when AdamW's moments are there."""

    def __init__(self, layout: Layout):
        self.layout = layout
        weights = layout.weights()
        self.layers = {layer: [w for w in weights if w.layer == layer] for layer in layout.layers}
        self.outside = [w for w in weights if w.layer is None]
        self.waiting = self._state([w for w in weights if layout.waits(w)])
        """In main memory."""
        self.state = self._state(weights)
        self.offloads = layout.recipe.offload == "cpu"
        self.teacher = None if layout.teacher is None else Memory(layout.of_teacher(layout.teacher))
        saved = sum(layout.held_bytes(w) for w in weights if not layout.stays_in_model(w)) + self.state["optimizer"]
        self.staging = {"checkpoint staging": saved} if self._saves_while_training() else {}
        self.held = {"buffers": self._buffers()} | self._state([w for w in weights if not layout.waits(w)])
        if layout.device == "cpu":
            self.held |= self.staging
        if self.teacher is not None:
            self.held["teacher"] = sum(self.teacher.held.values())

    def peak(self) -> Moment:
        return max(self.moments(), key=lambda moment: moment.total_bytes)

    def moments(self) -> Iterator[Moment]:
        last = self.layout.layers.stop - 1  # the last stage may have none
        if self.layout.distils:
            yield self._teaching()
        yield self._moment("forward pass", last, self._gathered(last), self._taught())
        if self.layout.has_head:
            loss = logits_bytes(self.layout) + (kl_bytes(self.layout) if self.layout.distils else 0)
            yield self._moment("loss", last, self._gathered(None), {"logits and loss": loss})
        for layer in reversed(self.layout.layers):
            yield self._moment("backward pass", layer, self._gathered(layer), self._working(layer))
        gradients = 0 if self.offloads else self._all_summed
        yield Moment("optimizer", self.held | {"gradients": gradients} | self._rounding())

    def main_memory(self) -> dict[str, int]:
        """What it is -> bytes. Of a GPU's rank: offloaded state, and the copy of an asynchronous save."""
        if self.layout.device == "cpu":
            return self.peak().parts
        waiting = self.waiting | ({"gradients": self._summed(self.layout.weights())} if self.offloads else {})
        if self.teacher is not None:
            waiting["teacher"] = sum(self.teacher.waiting.values())
        return {name: value for name, value in waiting.items() if value} | self.staging

    def checkpoint_bytes(self) -> int:
        """On disk, of all ranks and stages: weights that may have changed and moments, once."""
        saved = [weight for weight in self.layout.model.weights() if not self.layout.stays_in_model(weight)]
        numel = sum(weight.numel for weight in saved)
        trained = sum(weight.numel for weight in saved if self.layout.trains(weight))
        return MASTER_BYTES * numel + 2 * self.layout.moment_bytes * trained

    def _state(self, weights: list[Weight]) -> dict[str, int]:
        return {
            "weights": sum(self.layout.held_bytes(w) for w in weights),
            "optimizer": 2 * self.layout.moment_bytes * self._trained_numel(weights),
        }

    def _saves_while_training(self) -> bool:
        recipe = self.layout.recipe
        return recipe.checkpoint_async and recipe.save_every_steps < recipe.steps  # the last step's save is synchronous

    def _buffers(self) -> int:
        """Rope tables of each layer, and what a stage receives; statistics and selection biases are small."""
        layout = self.layout
        tables = len(layout.layers) * layout.recipe.seq_len * 2 * layout.model.H * 4
        return tables + layout.micro_batches * layout.neighbours * layout.residual_bytes

    def _trained_numel(self, weights: list[Weight]) -> int:
        return sum(self.layout.shard_numel(w) for w in weights if self.layout.trains(w))

    def _summed(self, weights: list[Weight]) -> int:
        return MASTER_BYTES * self._trained_numel(weights)

    def _rounding(self) -> dict[str, int]:
        """Moments in half precision are computed in float32, of one weight at a time: both, noise, and their sum."""
        if self.layout.moment_bytes == MASTER_BYTES or self.offloads:
            return {}
        largest = max((self.layout.shard_numel(w) for w in self.layout.weights() if self.layout.trains(w)), default=0)
        return {"rounding": 4 * MASTER_BYTES * largest}

    def _moment(self, name: str, layer: int, gathered: int, more: dict[str, int]) -> Moment:
        """`layer` is the last one whose activations are there; of the micro-batches before, all are."""
        kept = self._kept
        below = sum(kept[i] for i in self.layout.layers if i <= layer)
        activations = below + (self.layout.micro_batches_in_flight - 1) * sum(kept.values())
        parts = {"gradients": self._gradients(layer), "activations": activations, "gathered weights": gathered}
        for key, value in more.items():
            parts[key] = parts.get(key, 0) + value
        return Moment(name, self.held | parts)

    @cached_property
    def _kept(self) -> dict[int, int]:
        return {layer: block_bytes(self.layout, layer) for layer in self.layout.layers}

    @cached_property
    def _all_summed(self) -> int:
        return self._summed(self.layout.weights())

    @cached_property
    def _all_whole(self) -> int:
        """Gradients of the stage before they are shared out."""
        weights = self.layout.weights()
        return MASTER_BYTES * sum(self.layout.part_numel(w) for w in weights if self.layout.trains(w))

    def _teaching(self) -> Moment:
        """The forward pass of the teacher, or of the frozen slices, which keeps nothing but the logits."""
        teacher = self.teacher or self
        last = teacher.layout.layers.stop - 1
        transient = max(teacher_logits_bytes(self.layout), kept_bytes(teacher.layout, last))
        parts = {"gradients": self._gradients(last), "gathered weights": teacher._gathered(last)}
        return Moment("teacher", self.held | parts | {"activations": transient})

    def _taught(self) -> dict[str, int]:
        return {"logits and loss": teacher_logits_bytes(self.layout)} if self.layout.distils else {}

    def _gradients(self, layer: int) -> int:
        """Those that are there when `layer` is computed backwards; after the first micro-batch, all. Sums over the
        ranks, but whole where they are summed once a step, as in a stage of a pipeline."""
        if self.offloads:
            return 0
        if self.layout.is_stage or (self.layout.recipe.gradient_sync == "step" and self.layout.micro_batches > 1):
            return self._all_whole
        if self.layout.micro_batches > 1:
            return self._all_summed
        return self._summed([w for w in self.layout.weights() if w.layer is not None and w.layer > layer])

    def _gathered(self, layer: int | None) -> int:
        """While a layer is computed (None: the head)."""
        if self.layout.is_stage:
            return self.layout.gathered_bytes(self.layout.weights())
        outside = self._outside(layer is None)
        if layer is None:
            return outside
        ahead = self.layout.shards > 1  # one rank copies a layer when it is there, and nothing before
        there = [i for i in (layer - 1, layer) if i >= 0] if ahead else [layer]
        return outside + sum(self.layout.gathered_bytes(self.layers[i]) for i in there)

    def _outside(self, at_head: bool) -> int:
        """A tied embedding is gathered throughout; else the head's group until its backward pass is done."""
        if self.layout.model.tied:
            return self.layout.gathered_bytes(self.outside)
        head = [w for w in self.outside if not w.is_embedding]
        return self.layout.gathered_bytes(head) if at_head else 0

    def _working(self, layer: int) -> dict[str, int]:
        trained = [w for w in self.layers[layer] if self.layout.trains(w)]
        numel = sum(self.layout.part_numel(w) for w in trained)
        whole, summed = numel * self.layout.compute_bytes, numel * MASTER_BYTES
        return {
            "activations": recomputed_bytes(self.layout, layer) + working_bytes(self.layout, layer),
            "gradient buffers": whole + 2 * summed,
        }
