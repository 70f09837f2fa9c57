"""Experts as single matrices: unbound from their packed tensors, or in int8 or float16, which take fewer bytes.

Shapes: T tokens, D model width, E experts (frozen ones first), K active experts, f neurons per expert, n rows of one
expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.matrices import Matrix, PackedDtype, packed_matrix
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import apply_experts
from lamella.moe.paths.decode import decode_experts
from lamella.moe.provider import ExpertComputer
from lamella.moe.routing import Routing


class Unbound(ExpertComputer):
    """Gated experts in memory, whose single matrices are looked up once and not for every token."""

    def __init__(self, frozen: Experts, trainable: Experts):
        self.frozen, self.trainable = frozen, trainable
        pairs = zip(frozen, trainable, strict=True)
        self.gate_up, self.down = (f.detach().unbind(0) + t.detach().unbind(0) for f, t in pairs)

    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """By the path for decoding where there is one token on a CPU; several by the fastest path."""
        if len(x_TD) == 1 and x_TD.device.type == "cpu":
            chosen = routing.expert_ids_TK[0].tolist()
            return decode_experts(x_TD, chosen, routing.weights_TK, self.gate_up, self.down, activation)
        return apply_experts(x_TD, routing, self.frozen, self.trainable, activation=activation)


class Quantised(ExpertComputer):
    """Gated experts in another dtype; they are rounded when this is made, and the originals can be let go."""

    def __init__(self, frozen: Experts, trainable: Experts, dtype: PackedDtype):
        self.gate_up, self.down = (
            [packed_matrix(weight, dtype) for part in pair for weight in part.detach()]
            for pair in zip(frozen, trainable, strict=True)
        )

    @property
    def nbytes(self) -> int:
        """What all weights take."""
        return sum(matrix.nbytes for matrix in (*self.gate_up, *self.down))

    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """One expert after another, on the tokens that chose it."""
        if len(x_TD) == 1:
            chosen = routing.expert_ids_TK[0].tolist()
            return one_token(x_TD, chosen, routing.weights_TK, self.gate_up, self.down, activation)
        y_TD = torch.zeros_like(x_TD)
        for e in routing.expert_ids_TK.unique().tolist():
            token_n, k_n = torch.where(routing.expert_ids_TK == e)
            gate_nf, up_nf = self.gate_up[e](x_TD[token_n]).chunk(2, dim=-1)
            hidden_nf = ACTIVATIONS[activation](gate_nf) * up_nf * routing.weights_TK[token_n, k_n, None].to(x_TD.dtype)
            y_TD.index_add_(0, token_n, self.down[e](hidden_nf))
        return y_TD


def one_token(
    x_1D: Tensor,
    chosen: Sequence[int],
    weights_1K: Tensor,
    gate_up: Sequence[Matrix],
    down: Sequence[Matrix],
    activation: Activation,
) -> Tensor:
    """One token's output [1, D] of the chosen experts."""
    gate_Kf, up_Kf = torch.cat([gate_up[e](x_1D) for e in chosen]).chunk(2, dim=-1)
    hidden_Kf = ACTIVATIONS[activation](gate_Kf).mul_(up_Kf).mul_(weights_1K.to(x_1D.dtype).t())
    rows = [down[e](hidden_1f) for e, hidden_1f in zip(chosen, hidden_Kf.split(1), strict=True)]
    return torch.cat(rows).sum(dim=0, keepdim=True)
