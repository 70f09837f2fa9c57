"""What a conversion may say about its calibration: the text, the guard, the balance. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lamella.errors import UserError, check_choice

Metric = Literal["perplexity", "kl"]


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text the layers are shown."""

    data: str = "python-docs"
    """A source as in `lamella.data.sources`."""
    num_tokens: int = 16384
    """Rounded down to whole windows."""
    sequence_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"the calibration's seed is {self.seed}; it must be 0 or a positive number")
        if self.sequence_length < 2:
            raise UserError(f"the calibration windows have {self.sequence_length} tokens; they need at least 2")
        if self.num_tokens < self.sequence_length:
            raise UserError(
                f"{self.num_tokens} calibration tokens do not fill a window of {self.sequence_length}; "
                "raise the tokens or shorten the window"
            )

    @property
    def num_windows(self) -> int:
        return self.num_tokens // self.sequence_length


@dataclass(frozen=True)
class Guard:
    """Budgets. `perplexity`: a ratio to the dense model's. `kl`: nats per token, KL(dense || converted)."""

    metric: Metric = "perplexity"
    per_layer: float = 1.05
    """The metric after a layer over the one before it, or for kl the difference."""
    total: float = 1.5
    """The metric after a layer."""
    tokens: int = 2048
    """Calibration tokens that every test scores."""

    def __post_init__(self) -> None:
        check_choice("the guard's metric", self.metric, get_args(Metric))
        least = 1.0 if self.metric == "perplexity" else 0.0
        for name in ("per_layer", "total"):
            if not getattr(self, name) >= least:
                raise UserError(
                    f"the guard's {name} is {getattr(self, name)}; for {self.metric} it is at least {least}"
                )


def check_balance(target: float | None) -> None:
    """UserError for what no MaxVio can be; None is no target."""
    if target is not None and not target > 0:
        raise UserError(f"balance is {target}; it must be a MaxVio above 0")
