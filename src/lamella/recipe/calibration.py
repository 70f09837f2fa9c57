"""What a conversion may say about its calibration: the text, the guard, the balance. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lamella.recipe.check import Options

Metric = Literal["perplexity", "kl"]
GENERATED = "generated"
"""The source of text that the dense model itself writes: a conversion that needs no data."""


@dataclass(frozen=True)
class CalibrationText(Options):
    """An entry of `calibration.data`: a text and its share of the windows."""

    source: str
    """This text is shown: a source as in `data` of a training recipe, or `generated`."""
    weight: float = 1.0
    """The text gives this share of the windows, over the sum of all weights."""

    def problems(self) -> list[str]:
        return [] if self.weight > 0 else [f"the weight of {self.source} is {self.weight}; it must be above 0"]


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """Which text the layers are shown."""

    data: str | tuple[CalibrationText, ...] = "python-docs"
    """The layers are shown the training part of this text, a source as in `data` of a training recipe, or `generated`:
    documents that the dense model itself samples at temperature 1, each from a random first token. Several texts are
    mixed by weight: [{source: generated, weight: 2}, {source: corpus/, weight: 1}]."""
    num_tokens: int = 65536
    """So many tokens of it are used, rounded down to whole windows."""
    sequence_length: int = 512
    """The text is cut into windows of this many tokens."""
    seed: int = 0
    """The windows are chosen by this seed."""

    def problems(self) -> list[str]:
        found = []
        if not self.data:
            found.append("calibration.data names no text; name one, or `generated`")
        if self.seed < 0:
            found.append(f"the calibration's seed is {self.seed}; it must be 0 or a positive number")
        if self.sequence_length < 2:
            found.append(f"the calibration windows have {self.sequence_length} tokens; they need at least 2")
        elif self.num_tokens < self.sequence_length:
            found.append(
                f"{self.num_tokens} calibration tokens do not fill a window of {self.sequence_length}; "
                "raise the tokens or shorten the window"
            )
        elif not isinstance(self.data, str) and self.num_windows < len(self.data):
            found.append(
                f"{self.num_tokens} calibration tokens are {self.num_windows} windows, fewer than the "
                f"{len(self.data)} texts; raise the tokens or shorten the window"
            )
        return found

    @property
    def num_windows(self) -> int:
        return self.num_tokens // self.sequence_length

    @property
    def texts(self) -> tuple[CalibrationText, ...]:
        """The texts with their weights; one alone has weight 1."""
        return (CalibrationText(self.data),) if isinstance(self.data, str) else self.data

    def windows_of_texts(self) -> list[int]:
        """How many of the windows each text gives: its share, whole windows by the largest remainders."""
        total = sum(text.weight for text in self.texts)
        shares = [self.num_windows * text.weight / total for text in self.texts]
        counts = [int(share) for share in shares]
        by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
        for i in by_remainder[: self.num_windows - sum(counts)]:
            counts[i] += 1
        return counts


@dataclass(frozen=True)
class Guard(Options):
    """Budgets: a layer that exceeds one stays dense."""

    metric: Metric = "perplexity"
    """The model is tested after each layer by its perplexity, a ratio to the dense model's, or by kl, the
    KL(dense || converted) in nats per token."""
    per_layer: float = 1.05
    """The metric after a layer may be at most this times the one before it; for kl it may be this much larger."""
    total: float = 1.5
    """The metric after any layer may be at most this."""
    tokens: int = 2048
    """Each test scores this many calibration tokens."""

    def problems(self) -> list[str]:
        least = 1.0 if self.metric == "perplexity" else 0.0
        return [
            f"the guard's {name} is {getattr(self, name)}; for {self.metric} it is at least {least}"
            for name in ("per_layer", "total")
            if not getattr(self, name) >= least
        ]


def balance_problems(target: float | None) -> list[str]:
    """What is wrong with a target for MaxVio; None is no target."""
    return [] if target is None or target > 0 else [f"balance is {target}; it must be a MaxVio above 0"]
