"""What a conversion will write: listed before a weight or a text is seen, and then decided; one plan for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lamella.checkpoint.pieces import Sink
from lamella.checkpoint.plan import WritePlan
from lamella.checkpoint.remote import AnyPath
from lamella.checkpoint.source import Checkpoint
from lamella.jsons import Json

if TYPE_CHECKING:
    import torch

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


Write = Callable[[WritePlan, Path, Callable[[int], None]], None]
"""(plan, folder, what is told of bytes just written)"""


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
    entry: Json = field(default_factory=dict)
    """What the method adds to config.json, where the new config is that of a stock class, which has no place for it."""
    read_from: frozenset[AnyPath] = frozenset()
    """Files of other models than `source`, which must not be overwritten either."""
    write: Write | None = None
    """Writes the decided plan into an empty folder, with the files beside the weights; None: `written`."""

    @property
    def files(self) -> set[AnyPath]:
        """All that the tensors are read from."""
        return {*self.read_from} | {tensor.path for tensor in self.source.tensors.values()}

    def decided(self, work: Workspace) -> WritePlan:
        """The plan to be written; may take long."""
        return self.listing if self.decide is None else self.decide(work)


class Undecided:
    """The piece of a tensor of which only the size is known yet."""

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        raise AssertionError("a listing cannot be written: decide it first")
