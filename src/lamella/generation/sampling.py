"""How the next token is drawn from a model's logits.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Which tokens can follow, how likely each is, and when to end."""

    max_tokens: int = 128
    temperature: float = 0.0
    """Logits are divided by it; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this share of the probability together (arXiv 1904.09751)."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    seed: int | None = None
    """Of the draws; None: another one each time."""
    stop: tuple[str, ...] = ()
    """A text ends before any of these."""
    ignore_eos: bool = False
    """Go on after the model's own token for the end."""

    def __post_init__(self) -> None:
        problems = {
            f"max tokens is {self.max_tokens}; it must be at least 1": self.max_tokens < 1,
            f"temperature is {self.temperature}; it must be 0 or more": not 0 <= self.temperature < float("inf"),
            f"top-p is {self.top_p}; it must be above 0 and at most 1": not 0 < self.top_p <= 1,
            f"top-k is {self.top_k}; it must be 0 or more": self.top_k < 0,
            "a stop text is empty; leave it out": "" in self.stop,
        }
        if said := [text for text, wrong in problems.items() if wrong]:
            raise UserError("; ".join(said))

    def generator(self, device: torch.device) -> torch.Generator:
        """Random numbers for one call."""
        generator = torch.Generator(device)
        generator.seed() if self.seed is None else generator.manual_seed(self.seed)
        return generator


def next_tokens(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token [B] of each sequence: the likeliest, or one that is drawn."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    return torch.multinomial(probabilities(logits_BV, sampling), 1, generator=generator)[:, 0]


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """How likely each next token is to be drawn, float32 [B, V], at a temperature above 0."""
    logits_BV = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
        probability_BV = sorted_BV.softmax(dim=-1)
        # what comes before a token has the share already: it is left out; the first one never is
        enough_BV = probability_BV.cumsum(dim=-1) - probability_BV >= sampling.top_p
        logits_BV = logits_BV.scatter(1, order_BV, sorted_BV.masked_fill(enough_BV, -torch.inf))
    return logits_BV.softmax(dim=-1)
