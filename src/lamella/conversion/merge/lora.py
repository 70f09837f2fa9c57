"""A peft adapter (lamella.architecture.peft) merged into a model where its tensors are read: W + scale * B A.

Nothing is written in between.

Shapes: O outputs, I inputs, r rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.architecture.peft import CONFIG, WEIGHTS, Lora, read_lora
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor, read_header
from lamella.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MergedTensor(SourceTensor):
    """A weight that reads as W + scale * B A, computed in float32 and rounded to W's dtype."""

    weight: SourceTensor
    a: SourceTensor
    """[r, I]"""
    b: SourceTensor
    """[O, r]"""
    scale: float

    def read(self, start: int, count: int) -> Tensor:
        """As SourceTensor.read; whole rows are computed, and no others."""
        width, rank = self.shape[1], self.a.shape[0]
        first, last = start // width, -(-(start + count) // width)
        data = self.weight.read(first * width, (last - first) * width)
        a_rI = self.a.read(0, self.a.numel).view(rank, width).float()
        b_Or = self.b.read(first * rank, (last - first) * rank).view(-1, rank).float()
        merged = data.float() + ((b_Or @ a_rI) * self.scale).flatten()
        return merged.to(data.dtype)[start - first * width :][:count]


def with_adapter(source: Checkpoint, adapter: str, revision: str | None) -> dict[str, SourceTensor]:
    """The tensors of a model with a peft adapter merged in.

    Raises:
        UserError: no such adapter; one that is no LoRA, has what is not held (DoRA, biases, ...), or does not fit; the
            message names all that is wrong with it.
    """
    lora = read_lora(adapter_folder(adapter, revision))
    problems = lora.problems or [text for module in lora.halves for text in _misfits(lora, module, source)]
    if problems:
        raise lora.refused(problems)
    merged, own = dict(source.tensors), read_header(lora.weights)
    for module, halves in lora.halves.items():
        weight, a, b = merged[f"{module}.weight"], own[halves["A"].tensor], own[halves["B"].tensor]
        merged[weight.name] = MergedTensor(
            weight.name, weight.dtype, weight.shape, weight.path, weight.begin, weight, a, b, lora.scale(module)
        )
    return merged


def _misfits(lora: Lora, module: str, source: Checkpoint) -> list[str]:
    """Why a module's matrices cannot be added to the model's; they are for another base, or damaged."""
    halves, weight = lora.halves[module], source.tensors.get(f"{module}.weight")
    if weight is None:
        return [f"it is for {module}, which {source.name} has not: of another base"]
    if len(halves) < 2:
        return [f"it has half of a LoRA for {module}; train or download it again"]
    a, b, rank = halves["A"].shape, halves["B"].shape, lora.rank(module)
    if len(weight.shape) != 2 or (a, b) != ((rank, weight.shape[1]), (weight.shape[0], rank)):
        return [
            f"it changes {weight.name} by {list(b)} x {list(a)} at rank {rank}, but in {source.name} it is "
            f"{list(weight.shape)}: of another base"
        ]
    return []


def adapter_folder(adapter: str, revision: str | None) -> Path:
    """The adapter's folder on this disk, downloaded if it is a hub name."""
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w\-.]+/[\w\-.]+", adapter) or adapter.startswith("."):
        raise UserError(f"no such adapter: {adapter} is no folder here, and cannot be a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(adapter, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no such adapter: {adapter} is no folder here, and the hub did not give it ({reason})"
        ) from None
