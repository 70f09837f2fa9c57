"""The CPU's fast path: one expert's rows at a time, with a backward pass of its own.

Against autograd over the plain loop it saves the passes through memory that are not matrix products: an expert's
hidden activations stay in cache between the products, the gate weight is applied to the f-wide hidden rows and not
to the D-wide output rows, gradients of frozen weights are never formed, and only the gate and up activations
[N, 2f] are kept for the backward pass (a dense FFN under autograd keeps four tensors of that height and width f),
an expert's until its gradients are done, and weights' gradients are made when the first trainable expert needs them.

    forward, per expert:   g, u = x gate^T, x up^T     h = act(g) * u      y = (w h) down^T
    backward, per expert:  dh = dy down    dw = <dh, h>    dg, du from w dh    dx = [dg, du] [gate; up]
                           dgate_up = [dg, du]^T x    ddown = dy^T (w h)       for weights that train

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS, activate_into, activation_gradient_into
from lamella.moe.autograd import Context
from lamella.moe.packed import Experts
from lamella.moe.routing import Routing
from lamella.moe.seams import graph_is_kept


class Rows(NamedTuple):
    """The routed rows of one expert, which lie together once sorted."""

    expert: int
    """Index in its packed tensor."""
    trains: bool
    """Whether it lies in the trainable tensor."""
    span: slice
    """Its place in the sorted rows."""


def tiled_path(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """The weighted sum [T, D] of the outputs of each token's experts; once differentiable."""
    packed = (*frozen, *trainable)
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, routing.weights_TK, *packed))
    return _Tiled.apply(x_TD, routing.weights_TK.to(x_TD.dtype), routing.expert_ids_TK, saves, activation, *packed)


class TiledContext(Context):
    """What the forward pass keeps besides tensors."""

    counts_E: list[int]
    weights_shape: torch.Size
    activation: Activation


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: TiledContext, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, saves: bool, activation: Activation,
        frozen_gate_up: Tensor, frozen_down: Tensor, trainable_gate_up: Tensor, trainable_down: Tensor,
    ) -> Tensor:  # fmt: skip
        frozen, trainable = Experts(frozen_gate_up, frozen_down), Experts(trainable_gate_up, trainable_down)
        ids_N = expert_ids_TK.flatten()
        order_N = ids_N.argsort(stable=True)
        token_N = order_N.div(expert_ids_TK.shape[1], rounding_mode="floor")
        weights_N = weights_TK.flatten().index_select(0, order_N)
        counts_E = torch.bincount(ids_N, minlength=len(frozen_down) + len(trainable_down)).tolist()
        f = trainable_down.shape[-1] if len(trainable_down) else frozen_down.shape[-1]

        y_TD = torch.zeros_like(x_TD)
        # without a backward pass one expert's activations take the place of the last one's, which stays in cache
        reused_n2f = x_TD.new_empty(0 if saves else max(counts_E), 2 * f)
        saved_n2f: list[Tensor] = []
        for rows in _experts_with_rows(counts_E, len(frozen_down)):
            gate_up, down = _weights(rows, frozen, trainable)
            token_n = token_N[rows.span]
            x_nD = x_TD.index_select(0, token_n)
            gate_up_n2f = x_TD.new_empty(len(token_n), 2 * f) if saves else reused_n2f[: len(token_n)]
            gate_nf, up_nf = torch.mm(x_nD, gate_up.t(), out=gate_up_n2f).chunk(2, dim=-1)
            hidden_nf = ACTIVATIONS[activation](gate_nf).mul_(up_nf).mul_(weights_N[rows.span, None])
            y_TD.index_add_(0, token_n, torch.mm(hidden_nf, down.t(), out=x_nD))
            if saves:
                saved_n2f.append(gate_up_n2f)

        ctx.save_for_backward(x_TD, weights_N, order_N, token_N, *frozen, *trainable, *saved_n2f)
        ctx.counts_E, ctx.weights_shape, ctx.activation = counts_E, weights_TK.shape, activation
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: TiledContext, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_N, order_N, token_N, *rest = ctx.saved_tensors
        packed, saved_n2f = rest[:4], rest[4:]
        frozen, trainable = Experts(*packed[:2]), Experts(*packed[2:])
        grads = _PackedGradients(packed, ctx.counts_E, ctx.needs_input_grad[5:])
        dx_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[0] else None
        dweights_N = torch.empty_like(weights_N)
        for rows, gate_up_n2f in zip(_experts_with_rows(ctx.counts_E, len(frozen.down_proj)), saved_n2f, strict=True):
            token_n, w_n = token_N[rows.span], weights_N[rows.span]
            expert = _weights(rows, frozen, trainable)
            dweights_N[rows.span] = _expert_backward(
                rows, expert, gate_up_n2f, token_n, w_n, x_TD, dy_TD, dx_TD, grads, ctx.activation
            )
        dweights_TK = torch.empty_like(dweights_N).index_copy_(0, order_N, dweights_N).view(ctx.weights_shape)
        return dx_TD, dweights_TK, None, None, None, *grads.all()


def _expert_backward(
    rows: Rows, expert: tuple[Tensor, Tensor], gate_up_n2f: Tensor, token_n: Tensor, w_n: Tensor,
    x_TD: Tensor, dy_TD: Tensor, dx_TD: Tensor | None, grads: _PackedGradients, activation: Activation,
) -> Tensor:  # fmt: skip
    """Adds to dx and writes into grads; returns the gradient [n] of the gate weights. Frees gate_up."""
    gate_up, down = expert
    gate_nf, up_nf = gate_up_n2f.chunk(2, dim=-1)
    rows_nD = dy_TD.index_select(0, token_n)
    dhidden_nf = rows_nD @ down
    # one buffer: first act(gate) and hidden, then the gradients of gate and up
    pair_n2f = torch.empty_like(gate_up_n2f)
    active_nf, hidden_nf = dgate_nf, dup_nf = pair_n2f.chunk(2, dim=-1)
    activate_into(activation, gate_nf, active_nf)
    torch.mul(active_nf, up_nf, out=hidden_nf)
    dweights_n = torch.linalg.vecdot(dhidden_nf, hidden_nf)
    if (ddown := grads.down(rows)) is not None:
        torch.mm(rows_nD.t(), hidden_nf.mul_(w_n[:, None]), out=ddown)
    torch.mul(dhidden_nf.mul_(w_n[:, None]), active_nf, out=dup_nf)
    activation_gradient_into(activation, dhidden_nf.mul_(up_nf), gate_nf, dgate_nf)
    del dhidden_nf
    _free(gate_up_n2f)
    if dx_TD is not None:
        dx_TD.index_add_(0, token_n, torch.mm(pair_n2f, gate_up, out=rows_nD))
    if (dgate_up := grads.gate_up(rows)) is not None:
        torch.mm(pair_n2f.t(), torch.index_select(x_TD, 0, token_n, out=rows_nD), out=dgate_up)
    return dweights_n


class _PackedGradients:
    """The gradients of all four packed tensors, each made when the first expert needs it."""

    def __init__(self, packed: list[Tensor], counts_E: list[int], needed: tuple[bool, ...]):
        num_frozen = len(packed[1])
        self.packed, self.needed = packed, needed
        self.counts = [counts_E[:num_frozen]] * 2 + [counts_E[num_frozen:]] * 2
        self.grads: list[Tensor | None] = [None] * 4

    def gate_up(self, rows: Rows) -> Tensor | None:
        """The place for one expert's gradient of its gate and up; None where there is none to compute."""
        return self._place(2 if rows.trains else 0, rows)

    def down(self, rows: Rows) -> Tensor | None:
        """The place for one expert's gradient of its down matrix; None where there is none to compute."""
        return self._place(3 if rows.trains else 1, rows)

    def _place(self, index: int, rows: Rows) -> Tensor | None:
        return self._made(index)[rows.expert] if self.needed[index] else None

    def all(self) -> list[Tensor | None]:
        """All four gradients; None for a tensor that takes none."""
        return [self._made(i) if needed else None for i, needed in enumerate(self.needed)]

    def _made(self, index: int) -> Tensor:
        grad = self.grads[index]
        if grad is None:
            self.grads[index] = grad = torch.empty_like(self.packed[index])
            for e, count in enumerate(self.counts[index]):
                if not count:  # no product is written there; filling all of it costs 1% of a training step
                    grad[e].zero_()
        return grad


def _free(saved: Tensor) -> None:
    """Give a saved activation's memory back before the node does, unless the graph is kept for another backward."""
    if not graph_is_kept():
        saved.untyped_storage().resize_(0)


def _experts_with_rows(counts_E: list[int], num_frozen: int) -> Iterator[Rows]:
    start = 0
    for e, count in enumerate(counts_E):
        if count:
            trains = e >= num_frozen
            yield Rows(e - num_frozen * trains, trains, slice(start, start + count))
        start += count


def _weights(rows: Rows, frozen: Experts, trainable: Experts) -> tuple[Tensor, Tensor]:
    experts = trainable if rows.trains else frozen
    return experts.gate_up_proj[rows.expert], experts.down_proj[rows.expert]
