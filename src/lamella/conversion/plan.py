"""What a conversion will write: listed before a weight or a text is seen, and then decided; one plan for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lamella.checkpoint.pieces import Sink
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.source import Checkpoint

if TYPE_CHECKING:
    from lamella.calibrate import CalibrationStep
    from lamella.calibrate.guard import Verdict


class Workspace(NamedTuple):
    """The place where a conversion may keep what it finds, and whom it tells."""

    folder: Path
    """A calibration keeps its results here, and resumes from them."""
    on_progress: Callable[[CalibrationStep], None] = lambda _: None
    """It is told of each finished step of a calibration."""
    on_verdict: Callable[[Verdict], None] = lambda _: None
    """It is told of each layer that a guard tested."""


@dataclass(frozen=True)
class ConversionPlan:
    """A conversion of an open model, checked against its headers."""

    source: Checkpoint
    listing: WritePlan
    """Every tensor with its dtype and shape, and the new config.json, from options and headers alone."""
    decide: Callable[[Workspace], WritePlan] | None = None
    """The listing with its undecided tensors decided, by what weights and text say; None: all is decided."""
    remark: str = ""
    """This may differ in the decided plan."""

    def decided(self, work: Workspace) -> WritePlan:
        """The plan to be written; may take long."""
        return self.listing if self.decide is None else self.decide(work)


class Undecided:
    """The piece of a tensor of which only the size is known yet."""

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        raise AssertionError("a listing cannot be written: decide it first")
