"""Cut a gated FFN into slices whose sum is the FFN, and make noisy copies of them.

    y = W_down (silu(W_gate x) * (W_up x)) = sum over slices i of the same with slice i's neurons

Each slice holds its neurons' rows of W_gate and W_up and their columns of W_down, so the sum over all slices is the
dense FFN; only the order of the additions changes.

Shapes: D model width, F dense FFN width, S slices, f = F/S neurons per slice.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamella.errors import UserError


class Experts(NamedTuple):
    """Packed experts: E of them, each a gated FFN of f neurons."""

    gate_up_proj: Tensor
    """[E, 2f, D]: the f gate rows of an expert, then its f up rows."""
    down_proj: Tensor
    """[E, D, f]"""


def check_slices(ffn_width: int, slices: int) -> int:
    """Neurons per slice; UserError unless `slices` divides `ffn_width`."""
    if slices < 1 or ffn_width % slices:
        divisors = [s for s in range(2, 65) if ffn_width % s == 0]
        raise UserError(f"the FFN width {ffn_width} is not divisible by {slices} slices; choose one of {divisors}")
    return ffn_width // slices


def slice_gate_up(gate_FD: Tensor, up_FD: Tensor, slices: int) -> Tensor:
    """[F, D] gate and up matrices -> [S, 2f, D]."""
    f = check_slices(gate_FD.shape[0], slices)
    D = gate_FD.shape[1]
    return torch.cat([gate_FD.view(slices, f, D), up_FD.view(slices, f, D)], dim=1)


def slice_down(down_DF: Tensor, slices: int) -> Tensor:
    """[D, F] -> [S, D, f], contiguous."""
    f = check_slices(down_DF.shape[1], slices)
    return down_DF.view(-1, slices, f).transpose(0, 1).contiguous()


def slice_ffn(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, slices: int) -> Experts:
    """The slices of a gated FFN, in order. The inverse is `unslice_ffn`."""
    return Experts(slice_gate_up(gate_FD, up_FD, slices), slice_down(down_DF, slices))


def unslice_ffn(experts: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """(gate [F, D], up [F, D], down [D, F]) from slices laid side by side; bit for bit what `slice_ffn` was given."""
    S, f2, D = experts.gate_up_proj.shape
    gate, up = experts.gate_up_proj.view(S, 2, f2 // 2, D).unbind(1)
    return gate.reshape(-1, D), up.reshape(-1, D), experts.down_proj.transpose(0, 1).reshape(D, -1)


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
