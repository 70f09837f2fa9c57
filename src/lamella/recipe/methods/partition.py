"""What a conversion by partition is made of, as a person says it: a recipe's keys are these fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lamella.calibrate.guard import Guard
from lamella.calibrate.text import CalibrationOptions
from lamella.conversion.partition.decide import Axes
from lamella.errors import UserError, check_choice
from lamella.recipe.methods.slice import DTYPE_NAMES, parse_layers


@dataclass(frozen=True)
class PartitionOptions(Axes):
    """The axes of `lamella.conversion.partition.decide.Axes`, and on what and with what text."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic where a recipe is checked
    method: ClassVar[str] = "partition"
    entry: ClassVar[str] = "moe"

    layers: str = "all"
    """"all", "every:N" (layers 0, N, 2N, ...), or a list such as "0,3,5-9"."""
    first_dense: int = 0
    """The first layers stay dense, this many."""
    last_dense: int = 0
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    sequential: bool = True
    """Calibrate each layer on what it sees behind the converted ones, not behind the dense ones: its router and balance
    are then fitted to what they get (also behind one that the guard puts back). No difference with all parts active."""
    guard: Guard | None = None
    """Test the model after each layer, and put a layer back that exceeds its budget."""
    seed: int = 0
    dtype: str | None = None
    """"float32", "bfloat16" or "float16"; None: that of the source, tensor by tensor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, (*DTYPE_NAMES, None))
        for name in ("first_dense", "last_dense"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or a number of layers")

    def chosen_layers(self, num_layers: int) -> tuple[int, ...]:
        """Ascending; UserError if none is left."""
        inner = range(self.first_dense, num_layers - self.last_dense)
        chosen = tuple(layer for layer in parse_layers(self.layers, num_layers) if layer in inner)
        if not chosen:
            raise UserError(
                f"layers {self.layers} with first_dense {self.first_dense} and last_dense {self.last_dense} leave none "
                f"of the model's {num_layers} to convert"
            )
        return chosen

    def axes(self) -> Axes:
        return Axes(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Axes)})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self, moe: dict[str, Any]) -> str:
        scaled = self.scale_factor is not None and self.scale_factor != moe["num_experts_per_tok"]
        even = self.gate == "unit" or self.router == "zero"
        if not self.all_active:
            share = f"{self.active / self.parts:.0%}"
            parity = f"{share} of the neurons are active per token: the logits differ from the dense model's; train it."
        elif scaled:
            parity = (
                f"The experts' outputs are scaled by {self.scale_factor:g}: the logits differ from the dense model's."
            )
        elif even:
            parity = "All experts are active, each with weight 1 at the start: the logits are the dense model's."
        else:
            parity = "All experts are active, weighed by the router: the logits are nearly the dense model's."
        return f"""\
- Recipe: method `partition`, neurons by `{self.neurons}`, {self.parts} parts of which {self.active} are active
  (shared: {self.shared}), router `{self.router}`, gate `{self.gate}`, seed {self.seed}.
- {parity}"""
