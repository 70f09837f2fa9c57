"""The sections of a training recipe: schedules over optimizer steps, and losses beside the cross-entropy.

Steps are counted from 1: `at(step)` is what holds while optimizer step `step` computes. Imports no torch.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, model_serializer, model_validator

from lamella.recipe.check import Problems, Strict


def ramp(step: int, start: float, target: float, hold_steps: int, ramp_steps: int) -> float:
    """`start` for `hold_steps`, then a straight line that reaches `target` `ramp_steps` later."""
    done = step - 1 - hold_steps
    if done < 0:
        return start
    return start + (target - start) * min(1.0, done / ramp_steps) if ramp_steps else target


class Portion(Strict):
    """An entry of `data`: a source, alone (`python-docs`) or with a weight (`{source: python-docs, weight: 0.25}`)."""

    source: str
    """This text is read: a source as said under `data`."""
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """The source gives this share of every step's samples, over the sum of all weights; null, on every source, gives
    each the samples that it has."""
    stream: bool = False
    """The source is read and tokenised while training, in its own order, in place of being tokenised before."""

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        if not isinstance(value, str | dict):
            raise ValueError("write a source's name, or {source: NAME, weight: NUMBER, stream: true}")
        return {"source": value} if isinstance(value, str) else value

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        options = {"weight": self.weight} if self.weight is not None else {}
        options |= {"stream": True} if self.stream else {}
        return {"source": self.source} | options if options else self.source


class TwinShare(Strict):
    """The bias holds the twins at a share of the tokens; with a ramp from none, which is the dense model exactly."""

    start: float = Field(default=0.0, ge=0, le=1)
    """The twins get this share of the tokens at first; 0 is the dense model exactly."""
    hold_steps: int = Field(default=0, ge=0)
    """For this many steps the share stays at `start`."""
    ramp_steps: int = Field(default=0, ge=0)
    """Over the next this many steps the share goes to `target` in a straight line."""
    target: float = Field(default=0.5, ge=0, le=1)
    """The twins get this share of the tokens in the end."""

    def at(self, step: int) -> float:
        """The share wanted while optimizer step `step` (from 1) computes."""
        return ramp(step, self.start, self.target, self.hold_steps, self.ramp_steps)


class TopKSchedule(Strict):
    """Flat routing: experts per token, from a start to the model's own number (as EvoMoE goes from dense to sparse,
    arXiv 2112.14397). The output keeps its scale; see `lamella.moe.routing.with_top_k`."""

    start: PositiveInt
    """Each token is computed by this many experts at first."""
    hold_steps: int = Field(default=0, ge=0)
    """For this many steps the number stays at `start`."""
    ramp_steps: PositiveInt
    """Over the next this many steps the number goes to the model's own."""

    def at(self, step: int, top_k: int) -> int:
        """Experts per token in optimizer step `step` (from 1) of a layer whose own number is `top_k`."""
        return round(ramp(step, self.start, top_k, self.hold_steps, self.ramp_steps))


class Sides(Strict):
    """Which sources are for the frozen slices, and which for the twins."""

    to_slices: list[str] = Field(default=[], validate_default=False)
    """The tokens of these sources, named as in `data`, are to be computed by the frozen slices: the old domain."""
    to_twins: list[str] = Field(default=[], validate_default=False)
    """The tokens of these sources are to be computed by the twins: the new domain."""

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if both := set(self.to_slices) & set(self.to_twins):
            raise Problems([f"{', '.join(sorted(both))} cannot be for both slices and twins"])
        return self


class RoutingLoss(Sides):
    """Twin routing: a cross-entropy on each pair's choice, for tokens of some sources, against forgetting. It trains
    the router alone.

    Per token, -log of the score of the expert that its source is for, averaged over the pairs; times `coefficient`,
    per layer, and averaged over all tokens of the step, those of sources in neither list counting 0.
    """

    coefficient: float = Field(default=0.1, gt=0)
    """The cross-entropy on the choices is added to the loss with this factor."""

    @model_validator(mode="after")
    def _possible(self) -> RoutingLoss:
        if not self.to_slices and not self.to_twins:
            raise Problems(["routing_loss names no source: set to_slices, to_twins or both"])
        return self


class RouterFit(Sides):
    """Twin routing: rows fitted before the first step, so that old text goes to the slices and new text to the twins;
    see `lamella.train.fit_router`."""

    samples: PositiveInt = 64
    """The rows are fitted to this many samples of each side, from its training text."""
    ridge: float = Field(default=0.01, gt=0)
    """The regression is regularised by this strength."""
    recall: float | None = Field(default=None, gt=0, lt=1)
    """The threshold of each layer is set so that this share of the new text's tokens goes to the twins; null puts it
    halfway between the sides. The lower, the less goes to the twins of old text that is unlike what was shown."""

    @model_validator(mode="after")
    def _possible(self) -> RouterFit:
        if not self.to_slices or not self.to_twins:
            raise Problems(["router_fit needs sources on both sides: set to_slices and to_twins"])
        return self


class LoRA(Strict):
    """Low-rank deltas on the frozen experts, never merged into them: the dense model stays what it was."""

    rank: PositiveInt = 16
    """The deltas of a matrix are a product of two of this rank."""
    alpha: float = Field(default=32.0, gt=0)
    """The deltas are scaled by alpha / rank."""


class OptimizerStates(Strict):
    """What AdamW keeps of each weight that trains."""

    states: Literal["float32", "bfloat16"] = "float32"
    """The means of the gradients and of their squares are held, and saved, in this precision. bfloat16 takes half of
    the memory and rounds by chance, so that small changes are not lost; weights stay float32."""


class Distil(Strict):
    """objective: distil. weight * temperature^2 * KL(teacher || student), both at the temperature, + (1 - weight) *
    cross-entropy, per token (Hinton et al. 2015, arXiv 1503.02531)."""

    weight: float = Field(default=0.5, gt=0, le=1)
    """The KL divergence to the teacher has this weight, the cross-entropy of the text the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """The logits of teacher and student are divided by it in the KL divergence."""
    teacher: str | None = None
    """The teacher is the dense or converted model of this folder, with the same tokenizer, held beside the student.
    null: the dense model inside the student, its frozen slices, which takes no memory but needs that nothing else of
    the dense model trains."""
