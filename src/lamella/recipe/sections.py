"""The sections of a training recipe: schedules over optimizer steps, and losses beside the cross-entropy.

Steps are counted from 1: `at(step)` is what holds while optimizer step `step` computes. Imports no torch.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_serializer, model_validator


class Strict(BaseModel):
    """Refuses keys that it does not know."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


def ramp(step: int, start: float, target: float, hold_steps: int, ramp_steps: int) -> float:
    """`start` for `hold_steps`, then a straight line that reaches `target` `ramp_steps` later."""
    done = step - 1 - hold_steps
    if done < 0:
        return start
    return start + (target - start) * min(1.0, done / ramp_steps) if ramp_steps else target


class Portion(Strict):
    """An entry of `data`: a source, alone (`python-docs`) or with a weight (`{source: python-docs, weight: 0.25}`)."""

    source: str
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    stream: bool = False
    """Read and tokenise it while training, in its own order, in place of tokenising first what the run can use."""

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
    hold_steps: int = Field(default=0, ge=0)
    """Steps at the start's share before the ramp."""
    ramp_steps: int = Field(default=0, ge=0)
    """Steps of the ramp, until the target is reached."""
    target: float = Field(default=0.5, ge=0, le=1)

    def at(self, step: int) -> float:
        """The share wanted while optimizer step `step` (from 1) computes."""
        return ramp(step, self.start, self.target, self.hold_steps, self.ramp_steps)


class TopKSchedule(Strict):
    """Flat routing: experts per token, from a start to the model's own number (as EvoMoE goes from dense to sparse,
    arXiv 2112.14397). The output keeps its scale; see `lamella.moe.routing.with_top_k`."""

    start: PositiveInt
    hold_steps: int = Field(default=0, ge=0)
    ramp_steps: PositiveInt

    def at(self, step: int, top_k: int) -> int:
        """Experts per token in optimizer step `step` (from 1) of a layer whose own number is `top_k`."""
        return round(ramp(step, self.start, top_k, self.hold_steps, self.ramp_steps))


class Sides(Strict):
    """Which sources are for the frozen slices, and which for the twins."""

    to_slices: list[str] = Field(default=[], validate_default=False)
    """Names of sources, as in `data`, whose tokens are to be computed by the frozen slices: the old domain."""
    to_twins: list[str] = Field(default=[], validate_default=False)
    """Likewise by the twins: the new domain."""

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if both := set(self.to_slices) & set(self.to_twins):
            raise ValueError(f"{', '.join(sorted(both))} cannot be for both slices and twins")
        return self


class RoutingLoss(Sides):
    """Twin routing: a cross-entropy on each pair's choice, for tokens of some sources, against forgetting. It trains
    the router alone.

    Per token, -log of the score of the expert that its source is for, averaged over the pairs; times `coefficient`,
    per layer, and averaged over all tokens of the step, those of sources in neither list counting 0.
    """

    coefficient: float = Field(default=0.1, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> RoutingLoss:
        if not self.to_slices and not self.to_twins:
            raise ValueError("routing_loss names no source: set to_slices, to_twins or both")
        return self


class RouterFit(Sides):
    """Twin routing: rows fitted before the first step, so that old text goes to the slices and new text to the twins;
    see `lamella.train.fit_router`."""

    samples: PositiveInt = 64
    """Of each side, from its training text."""
    ridge: float = Field(default=0.01, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> RouterFit:
        if not self.to_slices or not self.to_twins:
            raise ValueError("router_fit needs sources on both sides: set to_slices and to_twins")
        return self


class LoRA(Strict):
    """Low-rank deltas on the frozen experts, never merged into them: the dense model stays what it was."""

    rank: PositiveInt = 16
    alpha: float = Field(default=32.0, gt=0)
    """The deltas are scaled by alpha / rank."""


class Distil(Strict):
    """objective: distil. weight * temperature^2 * KL(teacher || student), both at the temperature, + (1 - weight) *
    cross-entropy, per token (Hinton et al. 2015, arXiv 1503.02531)."""

    weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    teacher: str | None = None
    """Folder of a dense or converted model with the same tokenizer, held beside the student. None: the dense model
    inside it, its frozen slices, which takes no memory but needs that nothing else of the dense model trains."""
