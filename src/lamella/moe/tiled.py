"""The CPU's fast path: one expert's rows at a time, with a backward pass of its own.

Against autograd over the plain loop it saves the passes through memory that are not matrix products: an expert's
hidden activations stay in cache between the products, the gate weight is applied to the f-wide hidden rows and not
to the D-wide output rows, gradients of frozen weights are never formed, and only the gate and up activations
[N, 2f] are kept for the backward pass (a dense FFN under autograd keeps four tensors of that height and width f).

    forward, per expert:   g, u = x gate^T, x up^T     h = silu(g) * u     y = (w h) down^T
    backward, per expert:  dh = dy down    dw = <dh, h>    dg, du from w dh    dx = [dg, du] [gate; up]
                           dgate_up = [dg, du]^T x    ddown = dy^T (w h)       for weights that train

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, n rows of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lamella.moe.routing import Routing
from lamella.moe.slicing import Experts


class Rows(NamedTuple):
    """The routed rows of one expert, which lie together once sorted."""

    expert: int
    """Index in its packed tensor."""
    trains: bool
    """Whether it lies in the trainable tensor."""
    span: slice
    """Its place in the sorted rows."""


def tiled_path(x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts) -> Tensor:
    """[T, D] -> [T, D]; once differentiable."""
    packed = (*frozen, *trainable)
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, routing.weights_TK, *packed))
    return _Tiled.apply(x_TD, routing.weights_TK.to(x_TD.dtype), routing.expert_ids_TK, saves, *packed)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, saves: bool,
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
        gate_up_N2f = x_TD.new_empty(len(ids_N) if saves else max(counts_E), 2 * f)
        for rows in _experts_with_rows(counts_E, len(frozen_down)):
            gate_up, down = _weights(rows, frozen, trainable)
            token_n = token_N[rows.span]
            x_nD = x_TD.index_select(0, token_n)
            gate_up_n2f = gate_up_N2f[rows.span] if saves else gate_up_N2f[: len(token_n)]
            gate_nf, up_nf = torch.mm(x_nD, gate_up.t(), out=gate_up_n2f).chunk(2, dim=-1)
            hidden_nf = F.silu(gate_nf).mul_(up_nf).mul_(weights_N[rows.span, None])
            y_TD.index_add_(0, token_n, torch.mm(hidden_nf, down.t(), out=x_nD))

        ctx.save_for_backward(x_TD, weights_N, order_N, token_N, gate_up_N2f, *frozen, *trainable)
        ctx.counts_E, ctx.weights_shape = counts_E, weights_TK.shape
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_N, order_N, token_N, gate_up_N2f, *packed = ctx.saved_tensors
        frozen, trainable = Experts(*packed[:2]), Experts(*packed[2:])
        grads = [
            _gradient_buffer(p, counts_E) if needed else None
            for p, counts_E, needed in zip(
                packed, _counts_by_tensor(ctx.counts_E, len(frozen.down_proj)), ctx.needs_input_grad[4:], strict=True
            )
        ]
        dx_TD = torch.zeros_like(x_TD) if ctx.needs_input_grad[0] else None
        dweights_N = torch.empty_like(weights_N)
        for rows in _experts_with_rows(ctx.counts_E, len(frozen.down_proj)):
            gate_up, down = _weights(rows, frozen, trainable)
            dgate_up, ddown = grads[2:] if rows.trains else grads[:2]
            token_n, w_n1 = token_N[rows.span], weights_N[rows.span, None]
            gate_nf, up_nf = gate_up_N2f[rows.span].chunk(2, dim=-1)
            dy_nD = dy_TD.index_select(0, token_n)
            dhidden_nf = dy_nD @ down
            silu_nf = F.silu(gate_nf)
            hidden_nf = silu_nf * up_nf
            dweights_N[rows.span] = torch.linalg.vecdot(dhidden_nf, hidden_nf)
            if ddown is not None:
                torch.mm(dy_nD.t(), hidden_nf.mul_(w_n1), out=ddown[rows.expert])
            dgate_up_n2f = _gate_up_gradient(dhidden_nf.mul_(w_n1), gate_nf, up_nf, silu_nf)
            if dgate_up is not None:
                torch.mm(dgate_up_n2f.t(), x_TD.index_select(0, token_n), out=dgate_up[rows.expert])
            if dx_TD is not None:
                dx_TD.index_add_(0, token_n, torch.mm(dgate_up_n2f, gate_up, out=dy_nD))
        dweights_TK = torch.empty_like(dweights_N).index_copy_(0, order_N, dweights_N).view(ctx.weights_shape)
        return dx_TD, dweights_TK, None, None, *grads


def _gate_up_gradient(dhidden_nf: Tensor, gate_nf: Tensor, up_nf: Tensor, silu_nf: Tensor) -> Tensor:
    """[n, 2f] gradient of (gate, up) for hidden = silu(gate) * up; overwrites dhidden."""
    n, f = gate_nf.shape
    dgate_up_n2f = gate_nf.new_empty(n, 2 * f)
    dgate_nf, dup_nf = dgate_up_n2f.chunk(2, dim=-1)
    torch.mul(dhidden_nf, silu_nf, out=dup_nf)
    torch.ops.aten.silu_backward.grad_input(dhidden_nf.mul_(up_nf), gate_nf, grad_input=dgate_nf)
    return dgate_up_n2f


def _counts_by_tensor(counts_E: list[int], num_frozen: int) -> list[list[int]]:
    """Rows per expert of frozen gate_up and down, trainable gate_up and down."""
    return [counts_E[:num_frozen]] * 2 + [counts_E[num_frozen:]] * 2


def _gradient_buffer(packed: Tensor, counts_E: list[int]) -> Tensor:
    """Zeros where no product will be written: filling all of it costs 1% of a training step."""
    buffer = torch.empty_like(packed)
    for e, count in enumerate(counts_E):
        if not count:
            buffer[e].zero_()
    return buffer


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
