"""A GGUF file held against its source, by llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lamella.architecture.moe import Mode
from lamella.errors import UserError
from lamella.export.check import Checked, Quality, refuse_difference, refuse_divergence, source_logits, untipped
from lamella.export.gguf.llama_cpp import find, log_probabilities

PLACES = 16  # each asks for the whole vocabulary as text


@dataclass(frozen=True)
class CheckedGguf(Checked):
    """Of log-probabilities, at PLACES places of a text; `quality` is never None."""

    def describe(self) -> str:
        assert self.quality is not None
        found = f"max |log-probability difference| {self.max_abs_logit_diff:.1e} in {self.reader}{self.left_out()}"
        return f"{found}, {self.quality.describe()}, {self.spans.describe()}"


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
    first_tie = int((places < reference.first_tie).sum())
    difference, tipped = untipped((found - expected).abs().amax(dim=-1), first_tie)
    quality = Quality.of(found, expected)
    if file.stem.endswith("-F32"):
        refuse_difference(difference, source)
    refuse_divergence(quality, source)
    return CheckedGguf(difference, spans, "llama.cpp", quality, tipped)
