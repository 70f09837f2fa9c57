"""Cut a gated FFN into slices whose sum is the FFN, and make noisy copies of them.

    y = W_down (silu(W_gate x) * (W_up x)) = sum over slices i of the same with slice i's neurons

Each slice holds its neurons' rows of W_gate and W_up and their columns of W_down, so the sum over all slices is the
dense FFN; only the order of the additions changes.

Shapes: D model width, F dense FFN width, S slices, f = F/S neurons per slice.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

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
