"""Noise on what is copied from a dense matrix, in units of the matrix's own standard deviation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lamella.checkpoint.pieces import ChangeBlock
from lamella.checkpoint.tensors import SourceTensor
from lamella.errors import UserError
from lamella.moe.noise import NOISE_BLOCK, add_noise, matrix_std


@dataclass(frozen=True)
class Noise:
    """A `lamella.checkpoint.pieces.Change` that adds normal noise."""

    scale: float
    """The noise's standard deviation in units of the matrix's own."""
    seed: int
    unit: int = NOISE_BLOCK

    def prepare(self, source: SourceTensor) -> ChangeBlock | None:
        """The noise of this matrix; UserError where its standard deviation is not finite."""
        std = noise_std(source, self)
        if not std:
            return None
        name, seed = source.name, self.seed
        return lambda data, start, dtype: _noisy(data, name, start, dtype, std, seed)


def noise_std(source: SourceTensor, noise: Noise) -> float:
    """Standard deviation of the noise to add, in the weights' own units; 0 without noise."""
    if noise.scale == 0:
        return 0.0
    std = matrix_std(source.read(start, count) for start, count in source.chunks())
    if not math.isfinite(std):
        raise UserError(f"{source.name} holds NaN or infinite values; the checkpoint is damaged")
    return noise.scale * std


def _noisy(data: Tensor, name: str, start: int, dtype: torch.dtype, std: float, seed: int) -> Tensor:
    """`data`, the elements from `start` on, plus noise, by blocks of the noise: they stay in a core's own cache."""
    noisy = torch.empty(data.numel(), dtype=dtype)
    for block in range(start // NOISE_BLOCK, -(-(start + data.numel()) // NOISE_BLOCK)):
        begin, end = max(start, block * NOISE_BLOCK), min(start + data.numel(), (block + 1) * NOISE_BLOCK)
        part = slice(begin - start, end - start)
        noisy[part] = add_noise(data[part].float(), name, seed, std, begin)
    return noisy
