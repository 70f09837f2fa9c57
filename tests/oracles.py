"""What slicing must give, whole matrices at a time: the oracle of the conversion, which works in chunks.

    y = W_down (silu(W_gate x) * (W_up x)) = sum over slices i of the same with slice i's neurons

Shapes: D model width, F dense FFN width, S slices, f = F/S neurons per slice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.architecture.sizes import check_slices
from lamella.moe.packed import Experts


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
