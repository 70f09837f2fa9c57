"""The row operations of the `grouped` path in plain PyTorch; `lamella.moe.paths.row_kernels` has the same in Triton.

Rows from `count` on are not rows: they may hold anything, and nothing reads what comes of them.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N rows of a buffer.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS, activation_gradient

HAS_TRITON = importlib.util.find_spec("triton") is not None


def runs_triton(device: torch.device) -> bool:
    """Whether Triton runs here: on a GPU, or anywhere in its interpreter, which is for tests."""
    return HAS_TRITON and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def row_ops(device: torch.device, activation: Activation = "silu") -> ModuleType:
    """The module whose row operations serve this device: Triton's, which know silu alone, or this one."""
    if activation == "silu" and runs_triton(device):
        from lamella.moe.paths import row_kernels

        return row_kernels
    return sys.modules[__name__]


def gather(x_TD: Tensor, token_N: Tensor, count: Tensor) -> Tensor:
    """The token of each row, [N, D]."""
    return x_TD.index_select(0, token_N)


def swiglu(gate_up_N2f: Tensor, weights_N: Tensor, count: Tensor, activation: Activation = "silu") -> Tensor:
    """The weighted activations weight * act(gate) * up, [N, f]."""
    gate_Nf, up_Nf = gate_up_N2f.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate_Nf) * up_Nf * weights_N[:, None].to(gate_Nf.dtype)


def swiglu_gradient(
    dhidden_Nf: Tensor, gate_up_N2f: Tensor, weights_N: Tensor, count: Tensor, activation: Activation = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass through `swiglu`: (gradient of gate and up [N, 2f], weighted hidden rows [N, f], gradient of
    the weights [N]).
    """
    gate_Nf, up_Nf = gate_up_N2f.chunk(2, dim=-1)
    weights_N1 = weights_N[:, None].to(gate_Nf.dtype)
    active_Nf = ACTIVATIONS[activation](gate_Nf)
    hidden_Nf = active_Nf * up_Nf
    dweights_N = (dhidden_Nf * hidden_Nf).sum(1, dtype=weights_N.dtype)
    dhidden_Nf = dhidden_Nf * weights_N1
    dgate_Nf = activation_gradient(activation, dhidden_Nf * up_Nf, gate_Nf)
    return torch.cat([dgate_Nf, dhidden_Nf * active_Nf], dim=1), hidden_Nf * weights_N1, dweights_N


def combine(a_ND: Tensor, b_ND: Tensor, count: Tensor, slot_TK: Tensor) -> Tensor:
    """The sum [T, D] of each token's rows; slots from `count` on are those of b."""
    (T, K), D = slot_TK.shape, a_ND.shape[1]
    slot_N = slot_TK.flatten()
    # chosen, not multiplied by 0 and 1: what lies beyond a buffer's rows may be NaN
    from_a_ND = a_ND.index_select(0, slot_N)
    from_b_ND = b_ND.index_select(0, (slot_N - count).clamp(min=0))
    rows_ND = torch.where((slot_N < count)[:, None], from_a_ND, from_b_ND)
    return rows_ND.view(T, K, D).sum(1)
