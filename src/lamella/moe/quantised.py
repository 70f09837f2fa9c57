"""Experts as single matrices: unbound from their packed tensors, or in int8 or float16, which take fewer bytes.

Shapes: T tokens, D model width, E experts (frozen ones first), K active experts, f neurons per expert, n rows of one
expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.matrices import Matrix, PackedDtype, packed_matrix
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import apply_experts
from lamella.moe.paths.decode import MOST_ROWS, add_experts, few_experts, weighed_hidden
from lamella.moe.provider import ExpertComputer, Portion, experts_in_portions, none_of
from lamella.moe.routing import Routing
from lamella.moe.routing_one import Chosen


class Unbound(ExpertComputer):
    """Gated experts in memory, whose single matrices are looked up once and not for every token.

    On a CPU the down matrices lie in memory as [f, D], of which the packed tensors become views: the product of a
    narrow matrix and a vector then adds up f long rows, which takes half the time of D short dot products. Experts that
    follow each other are one matrix for one token: twins as converted make the dense FFN's calls, and of 48 experts any
    16 lie in 11 runs.
    """

    def __init__(self, frozen: Experts, trainable: Experts):
        self.frozen, self.trainable = frozen, trainable
        if frozen.down_proj.device.type == "cpu":
            for part in (frozen, trainable):
                part.down_proj.data = part.down_proj.detach().transpose(1, 2).contiguous().transpose(1, 2)
        pairs = zip(frozen, trainable, strict=True)
        self.gate_up, self.down = (f.detach().unbind(0) + t.detach().unbind(0) for f, t in pairs)
        self._runs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """By the path for decoding where there are few tokens on a CPU; several by the fastest path."""
        if x_TD.device.type == "cpu" and len(x_TD) > 1 and routing.expert_ids_TK.numel() <= MOST_ROWS:
            return few_experts(x_TD, routing, self.gate_up, self.down, activation)
        return apply_experts(x_TD, routing, self.frozen, self.trainable, activation=activation)

    def add_one(self, y_D: Tensor, x_D: Tensor, chosen: Chosen, activation: Activation = "silu") -> None:
        """By a matrix-vector product for each run of experts that follow each other."""
        ids, weights = chosen.ascending()
        f = self.down[0].shape[1]
        gate_up_n = x_D.new_empty(len(ids) * 2 * f)
        downs = []
        for start, end in _runs(ids, len(self.frozen.down_proj)):
            gate_up, down = self._run(ids[start], end - start)
            torch.mv(gate_up, x_D, out=gate_up_n[start * 2 * f : end * 2 * f])
            downs.append((down, start * f, end * f))
        hidden_n = weighed_hidden(gate_up_n.view(len(ids), 2 * f), weights, activation).view(-1)
        for down, begin, end in downs:
            y_D.addmv_(down, hidden_n[begin:end])

    def _run(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """gate_up [count*2f, D] and down [D, count*f] of experts of one kind that follow each other: views."""
        if (first, count) not in self._runs:
            S = len(self.frozen.down_proj)
            part, i = (self.frozen, first) if first < S else (self.trainable, first - S)
            gate_up_E2fD, down_EfD = part.gate_up_proj.detach(), part.down_proj.detach().transpose(1, 2)
            self._runs[first, count] = (
                gate_up_E2fD[i : i + count].flatten(0, 1),
                down_EfD[i : i + count].flatten(0, 1).t(),
            )
        return self._runs[first, count]


def _runs(ids: Sequence[int], bound: int) -> Iterator[tuple[int, int]]:
    """(start, end) within ascending ids of each run of neighbours; none goes on over an id of `bound`."""
    start = 0
    for k in range(1, len(ids) + 1):
        if k == len(ids) or ids[k] != ids[k - 1] + 1 or ids[k] == bound:
            yield start, k
            start = k


class Quantised(ExpertComputer):
    """Gated experts in another dtype, each a matrix gate_up and a matrix down."""

    def __init__(self, gate_up: list[Matrix], down: list[Matrix]):
        self.gate_up, self.down = gate_up, down

    @classmethod
    def of(cls, frozen: Experts, trainable: Experts, dtype: PackedDtype) -> Quantised:
        """They are rounded, and the originals can be let go."""
        return cls(
            *(
                [packed_matrix(weight, dtype) for part in pair for weight in part.detach()]
                for pair in zip(frozen, trainable, strict=True)
            )
        )

    @property
    def nbytes(self) -> int:
        """What all weights take."""
        return sum(matrix.nbytes for matrix in (*self.gate_up, *self.down))

    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """One expert after another, on the tokens that chose it. What an id beyond these experts adds is left out."""
        y_TD = torch.zeros_like(x_TD)
        if len(x_TD) == 1:
            chosen = Chosen(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist())
            self.add_one(y_TD[0], x_TD[0], chosen, activation)
            return y_TD
        for e in routing.expert_ids_TK.unique().tolist():
            if e >= len(self.gate_up):
                continue
            token_n, k_n = torch.where(routing.expert_ids_TK == e)
            gate_nf, up_nf = self.gate_up[e](x_TD[token_n]).chunk(2, dim=-1)
            hidden_nf = ACTIVATIONS[activation](gate_nf) * up_nf * routing.weights_TK[token_n, k_n, None].to(x_TD.dtype)
            y_TD.index_add_(0, token_n, self.down[e](hidden_nf))
        return y_TD

    def add_one(self, y_D: Tensor, x_D: Tensor, chosen: Chosen, activation: Activation = "silu") -> None:
        """The rows of all experts are rounded to the dtype of the products' inputs in one call."""
        ids, weights = chosen.within(0, len(self.gate_up))
        if not ids:
            return
        x_1D = self.gate_up[ids[0]].rounded(x_D[None])
        gate_Kf, up_Kf = torch.cat([self.gate_up[e](x_1D) for e in ids]).to(x_D.dtype).chunk(2, dim=-1)
        hidden_Kf = self.down[ids[0]].rounded(ACTIVATIONS[activation](gate_Kf).mul_(up_Kf))
        rows_KD = torch.cat([self.down[e](hidden_1f) for e, hidden_1f in zip(ids, hidden_Kf.split(1), strict=True)])
        y_D.add_(torch.tensor(weights, dtype=x_D.dtype, device=x_D.device) @ rows_KD.to(x_D.dtype))


class Beside(ExpertComputer):
    """Frozen experts in fewer bytes, and the trainable ones, which follow them, as they are: all in memory."""

    def __init__(self, slices: Quantised, trainable: Experts):
        self.slices, self.trainable = slices, trainable
        self.first = len(slices.gate_up)
        self.gate_up, self.down = (tensor.unbind(0) for tensor in trainable)

    @property
    def nbytes(self) -> int:
        """What all weights take."""
        return self.slices.nbytes + sum(tensor.nbytes for tensor in self.trainable)

    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """The sum of both kinds' outputs."""
        y_TD = self.slices.compute(x_TD, routing, activation)
        if not len(self.trainable.down_proj):
            return y_TD

        def computed(x_ND: Tensor, own: Routing, experts: object) -> Tensor:
            assert isinstance(experts, Experts)
            return apply_experts(x_ND, own, experts, Experts._make(none_of(experts)), activation=activation)

        return y_TD + experts_in_portions(x_TD, routing, self, computed)

    def hand_out(self, expert_ids: Sequence[int]) -> Iterator[Portion]:
        """The trainable ones in one portion."""
        if any(e >= self.first for e in expert_ids):
            yield Portion(range(self.first, self.first + len(self.gate_up)), self.trainable)

    def add_one(self, y_D: Tensor, x_D: Tensor, chosen: Chosen, activation: Activation = "silu") -> None:
        """By matrix-vector products."""
        self.slices.add_one(y_D, x_D, chosen, activation)
        ids, weights = chosen.within(self.first, self.first + len(self.gate_up))
        if ids:
            own = [e - self.first for e in ids]
            matrices = [self.gate_up[e] for e in own], [self.down[e] for e in own]
            add_experts(y_D, x_D, Chosen(own, weights), *matrices, activation)
