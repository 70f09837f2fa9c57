"""What a config may do to an expert's weights on their way: noise, and a factor on the down projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella.checkpoint.pieces import ChangeBlock
from lamella.checkpoint.tensors import SourceTensor

if TYPE_CHECKING:
    from torch import Tensor

NOISE_BLOCK = 1 << 16  # as lamella.moe.noise has it; planning imports no torch


@dataclass(frozen=True)
class Scaled:
    """A `lamella.checkpoint.pieces.Change`: noise is added, then the factors are multiplied, each rounded to the
    source's dtype as mergekit's are."""

    label: str
    """With the tensor's name it decides the noise."""
    noise_std: float
    """In the weights' own units."""
    factors: tuple[float, ...]
    seed: int
    unit: int = NOISE_BLOCK

    def prepare(self, source: SourceTensor) -> ChangeBlock | None:
        """The change of this matrix."""
        return lambda data, start, dtype: self._changed(data, start, source.name).to(dtype)

    def _changed(self, data: Tensor, start: int, name: str) -> Tensor:
        from lamella.checkpoint.tensors import spans
        from lamella.moe.noise import add_noise

        if self.noise_std:
            noisy = data.float()
            for begin, count in spans(start, len(data), NOISE_BLOCK):
                part = slice(begin - start, begin - start + count)
                noisy[part] = add_noise(noisy[part], f"{name}@{self.label}", self.seed, self.noise_std, begin)
            data = noisy.to(data.dtype)
        for factor in self.factors:
            data = data * factor
        return data


def change_of(label: str, noise_std: float | None, factors: tuple[float | None, ...], seed: int) -> Scaled | None:
    """The change, or None where nothing changes; factors of None and 1 are left out."""
    real = tuple(factor for factor in factors if factor is not None and factor != 1.0)
    return Scaled(label, noise_std or 0.0, real, seed) if noise_std or real else None
