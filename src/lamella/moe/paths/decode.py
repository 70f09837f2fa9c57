"""One token on a CPU: matrix-vector products with the chosen experts' weights alone, as many bytes as the dense FFN.

Shapes: D model width, f neurons per expert, K active experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.packed import Experts
from lamella.moe.routing import Routing


def decode_path(
    x_1D: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """One token's output [1, D], for inference: nothing is kept for a backward pass."""
    gate_up, down = (f.unbind(0) + t.unbind(0) for f, t in zip(frozen, trainable, strict=True))
    return decode_experts(x_1D, routing.expert_ids_TK[0].tolist(), routing.weights_TK, gate_up, down, activation)


def decode_experts(
    x_1D: Tensor,
    chosen: Sequence[int],
    weights_1K: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    activation: Activation = "silu",
) -> Tensor:
    """The same of single experts' matrices, [2f, D] and [D, f], at their ids."""
    x_D = x_1D[0]
    gate_up_K2f = x_D.new_empty(len(chosen), gate_up[chosen[0]].shape[0])
    for e, row_2f in zip(chosen, gate_up_K2f.unbind(0), strict=True):
        torch.mv(gate_up[e], x_D, out=row_2f)
    gate_Kf, up_Kf = gate_up_K2f.chunk(2, dim=-1)
    hidden_Kf = ACTIVATIONS[activation](gate_Kf).mul_(up_Kf).mul_(weights_1K.to(x_D.dtype).t())
    y_D = torch.zeros_like(x_D)
    for e, hidden_f in zip(chosen, hidden_Kf.unbind(0), strict=True):
        y_D.addmv_(down[e], hidden_f)
    return y_D[None]
