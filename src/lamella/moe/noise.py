"""Noise on weights: a function of the tensor's name, the seed and the place in the tensor alone.

So it is the same however a matrix is cut, in any order and on any number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def noise_generator(name: str, seed: int) -> torch.Generator:
    """A generator that depends on the tensor's name and the seed alone, so noise is the same in any order."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


NOISE_BLOCK = 1 << 16
"""Elements per generator, so that any range of a matrix's noise can be drawn without the rest."""


def gaussian_noise(name: str, seed: int, start: int, count: int) -> Tensor:
    """Elements start .. start+count of the standard normal noise of the dense tensor `name`, float32, flattened.

    A function of name, seed and position alone: how a matrix is cut, the order and the threads do not matter.
    """
    noise = torch.empty(count)
    for block in range(start // NOISE_BLOCK, -(-(start + count) // NOISE_BLOCK)):
        drawn = torch.empty(NOISE_BLOCK).normal_(generator=noise_generator(f"{name}#{block}", seed))
        first = block * NOISE_BLOCK
        if start == first and count == NOISE_BLOCK:
            return drawn
        begin, end = max(start, first), min(start + count, first + NOISE_BLOCK)
        noise[begin - start : end - start] = drawn[begin - first : end - first]
    return noise


def add_noise(weights: Tensor, name: str, seed: int, std: float, start: int = 0) -> Tensor:
    """float32 `weights`, the elements from `start` on of the flattened dense tensor `name`, plus noise of this std."""
    return gaussian_noise(name, seed, start, weights.numel()).view_as(weights).mul_(std).add_(weights)


def matrix_std(chunks: Iterable[Tensor]) -> float:
    """Standard deviation of all elements of a matrix that comes in chunks (NaN if one of them is not finite).

    Summed in float64 by numpy, in one thread: the last digit does not depend on the machine's cores.
    """
    count, total, squares = 0, 0.0, 0.0
    buffer = np.empty(0)  # reused: fresh pages cost more than the sums
    for chunk in chunks:
        if buffer.size < chunk.numel():
            buffer = np.empty(chunk.numel())
        values = buffer[: chunk.numel()]
        torch.from_numpy(values).copy_(chunk.reshape(-1))
        count += values.size
        total += float(values.sum())
        squares += float(np.square(values, out=values).sum())
    if not math.isfinite(squares):
        return math.nan
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))
