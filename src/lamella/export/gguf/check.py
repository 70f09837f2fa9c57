"""A GGUF file held against its source, by llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lamella.architecture.moe import Mode
from lamella.errors import UserError
from lamella.export.check import Checked, refuse_difference, source_logits
from lamella.export.gguf.llama_cpp import find, log_probabilities

PLACES = 16  # each asks for the whole vocabulary as text
# Nats. Rounded experts move a model by tenths at most; a file that is wrong is off by whole ones.
MAX_DIVERGENCE = 1.0


@dataclass(frozen=True)
class CheckedGguf(Checked):
    """Of log-probabilities, at PLACES places of a text."""

    top_1: float = 1.0
    """Share of the places where both expect the same token."""
    divergence: float = 0.0
    """Mean KL divergence from the source, nats."""
    largest_divergence: float = 0.0

    def describe(self) -> str:
        found = f"max |log-probability difference| {self.max_abs_logit_diff:.1e} in {self.reader}"
        quality = f"top-1 {self.top_1:.0%}, KL divergence {self.divergence:.1e} (largest {self.largest_divergence:.1e})"
        return f"{found}, {quality}, {self.spans.describe()}"


def check_gguf(source: Path, exported: Path, mode: Mode = "routed", tokens: int | None = None) -> CheckedGguf | None:
    """None where llama.cpp is not installed.

    Raises:
        UserError: llama.cpp does not take the file, or computes something else from it.
    """
    if find() is None:
        return None
    file = next(exported.glob("*.gguf"))
    references, spans = source_logits(source, mode, tokens, gaps=False)
    reference = references[0]
    places = np.unique(np.linspace(1, len(reference.kept) - 1, PLACES).round().astype(int))
    prompts: list[list[int] | str] = [reference.ids_1L[0, : int(reference.kept[at]) + 1].tolist() for at in places]
    try:
        # llama.cpp's sums are fp32: its log-probabilities add up to 1 only after another normalisation.
        found = torch.from_numpy(log_probabilities(file, prompts)).double().log_softmax(-1)
    except RuntimeError as error:
        raise UserError(f"llama.cpp does not take {file.name}: {error}") from None
    expected = reference.logits[places].double().log_softmax(-1)
    if found.shape != expected.shape:
        raise UserError(f"llama.cpp computes {found.shape[1]} tokens, the model has {expected.shape[1]}")
    difference = (found - expected).abs().max().item()
    divergences = (expected.exp() * (expected - found)).sum(-1)
    divergence = divergences.mean().item()
    top_1 = (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
    if file.stem.endswith("-F32"):
        refuse_difference(difference, source)
    elif not divergence <= MAX_DIVERGENCE:
        raise UserError(
            f"the file is {divergence:.2g} nats from {source} (allowed: {MAX_DIVERGENCE}); take a wider dtype; "
            "nothing was kept"
        )
    return CheckedGguf(difference, spans, "llama.cpp", top_1, divergence, divergences.max().item())
