"""The `grouped` path: `torch.nn.functional.grouped_mm` over the frozen rows and over the trainable rows.

A grouped product reads its groups' rows from row 0 on, stops at the last group's end, and leaves the rows beyond it
undefined. Where the trainable rows begin is known on the device alone; so each half, frozen and trainable, has
buffers of its own with room for all N rows: no host synchronisation, no copy of any weight, and no product but those
of rows that exist. The halves' unused memory is never read.

The products themselves are given: torch's here, those of quack-kernels in `quack_path`.

Kept for the backward pass: x and the two halves' gate and up activations, [N, 2f] each, as much as a dense FFN keeps
under autograd. Frozen weights take no gradient.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, E experts of one half;
m, n widths of a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.autograd import Context
from lamella.moe.packed import Experts
from lamella.moe.paths.dispatch import Dispatch, dispatch, to_rows
from lamella.moe.paths.row_ops import row_ops
from lamella.moe.routing import Routing


class Half(NamedTuple):
    """The rows of the frozen, or of the trainable experts, sorted by expert, from row 0 on."""

    token_N: Tensor
    weights_N: Tensor
    ends_E: Tensor
    """int32; the last is the number of rows that exist."""

    @property
    def num_rows(self) -> Tensor:
        """The number of rows that exist, [1] on the device."""
        return self.ends_E[-1:]


def grouped_fits(x_TD: Tensor, experts: Experts) -> bool:
    """Whether rows start at multiples of 16 bytes, as grouped_mm wants them."""
    widths = (x_TD.shape[1], experts.down_proj.shape[-1])
    return all(w * x_TD.element_size() % 16 == 0 for w in widths)


class Rows(NamedTuple):
    """The rows of one half: `values[token_N]`, or `values` themselves where they are gathered."""

    values: Tensor
    token_N: Tensor | None = None


class Products(Protocol):
    """Matrix products of the rows of each expert; rows beyond the last expert's are neither read nor made."""

    def gather(self, x_TD: Tensor, half: Half) -> Rows:
        """The half's rows of x, copied or by their places."""
        ...

    def product(self, rows_Nm: Rows, matrices_Emn: Tensor, half: Half) -> Tensor:
        """Each row times its expert's matrix, [N, n]."""
        ...

    def outer(self, left_Nm: Rows, right_Nn: Rows, half: Half) -> Tensor:
        """The sum over each expert's rows of left^T right, [E, m, n]; zeros where an expert has none."""
        ...


class TorchProducts:
    """`torch.nn.functional.grouped_mm`, on gathered rows."""

    def gather(self, x_TD: Tensor, half: Half) -> Rows:
        """A copy of the rows."""
        return Rows(row_ops(x_TD.device).gather(x_TD, half.token_N, half.num_rows))

    def product(self, rows_Nm: Rows, matrices_Emn: Tensor, half: Half) -> Tensor:
        """See `Products`."""
        return F.grouped_mm(rows_Nm.values, matrices_Emn, offs=half.ends_E)

    def outer(self, left_Nm: Rows, right_Nn: Rows, half: Half) -> Tensor:
        """See `Products`."""
        return F.grouped_mm(left_Nm.values.t(), right_Nn.values, offs=half.ends_E)


class Kind(NamedTuple):
    """How the rows are computed: by which products, and with what between them."""

    products: Products
    activation: Activation


def grouped_path(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """The weighted sum [T, D] of the outputs of each token's experts; it waits for no host."""
    return by_products(Kind(TorchProducts(), activation), x_TD, routing, frozen, trainable)


def by_products(kind: Kind, x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts) -> Tensor:
    """As `grouped_path`, by these products; frozen weights take no gradient."""
    return _Grouped.apply(kind, x_TD.contiguous(), routing.weights_TK, routing.expert_ids_TK, *frozen, *trainable)


def split_halves(d: Dispatch, weights_N: Tensor, num_frozen: int) -> list[Half]:
    """The frozen half and the trainable one, those that have experts."""
    if num_frozen in (0, len(d.ends_E)):
        return [Half(d.token_N, weights_N, d.ends_E)]
    frozen = Half(d.token_N, weights_N, d.ends_E[:num_frozen])
    rolled_N = (torch.arange(len(weights_N), device=weights_N.device) + frozen.num_rows) % len(weights_N)
    trainable_ends_E = d.ends_E[num_frozen:] - frozen.num_rows
    return [frozen, Half(d.token_N[rolled_N], weights_N[rolled_N], trainable_ends_E)]


class GroupedContext(Context):
    """What the forward pass keeps besides tensors."""

    weights_dtype: torch.dtype
    num_halves: int
    kind: Kind


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: GroupedContext,
        kind: Kind,
        x_TD: Tensor,
        weights_TK: Tensor,
        expert_ids_TK: Tensor,
        *packed: Tensor,
    ) -> Tensor:
        num_frozen, num_trainable = len(packed[0]), len(packed[2])
        d = dispatch(expert_ids_TK, num_frozen + num_trainable)
        halves = split_halves(d, to_rows(weights_TK.float(), d), num_frozen)
        experts = _present(packed)
        made = [_half_forward(kind, x_TD, h, e) for h, e in zip(halves, experts, strict=True)]
        gate_ups, ys = zip(*made, strict=True)
        ctx.save_for_backward(x_TD, d.slot_TK, *packed, *gate_ups, *(t for half in halves for t in half))
        ctx.weights_dtype, ctx.num_halves, ctx.kind = weights_TK.dtype, len(halves), kind
        return row_ops(x_TD.device).combine(ys[0], ys[-1], halves[0].num_rows, d.slot_TK)

    @staticmethod
    def backward(ctx: GroupedContext, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, slot_TK, *saved = ctx.saved_tensors
        packed, saved = saved[:4], saved[4:]
        gate_ups, flat = saved[: ctx.num_halves], saved[ctx.num_halves :]
        halves = [Half(*flat[i : i + 3]) for i in range(0, len(flat), 3)]
        needs = [ctx.needs_input_grad[i : i + 2] for i in (4, 6) if len(packed[i - 4])]
        results = [
            _half_backward(ctx.kind, dy_TD.contiguous(), x_TD, *parts)
            for parts in zip(halves, gate_ups, _present(packed), needs, strict=True)
        ]
        count = halves[0].num_rows
        dx_TD = row_ops(x_TD.device).combine(results[0].dx_ND, results[-1].dx_ND, count, slot_TK)
        first_TK, last_TK = results[0].dweights_N[slot_TK], results[-1].dweights_N[(slot_TK - count).clamp(min=0)]
        dweights_TK = torch.where(slot_TK < count, first_TK, last_TK)
        missing = (None, None)
        grads = [
            *(results[0].grads if len(packed[0]) else missing),
            *(results[-1].grads if len(packed[2]) else missing),
        ]
        return None, dx_TD, dweights_TK.to(ctx.weights_dtype), None, *grads


def _present(packed: Sequence[Tensor]) -> list[Experts]:
    return [Experts(*packed[i : i + 2]) for i in (0, 2) if len(packed[i])]


def _half_forward(kind: Kind, x_TD: Tensor, half: Half, experts: Experts) -> tuple[Tensor, Tensor]:
    """The forward pass of one half: (gate and up [N, 2f], weighted output rows [N, D])."""
    products, activation = kind
    gate_up_N2f = products.product(products.gather(x_TD, half), experts.gate_up_proj.mT, half)
    hidden_Nf = row_ops(x_TD.device, activation).swiglu(gate_up_N2f, half.weights_N, half.num_rows, activation)
    return gate_up_N2f, products.product(Rows(hidden_Nf), experts.down_proj.mT, half)


class Gradients(NamedTuple):
    """The gradients of one half's rows, and of its experts' weights."""

    dx_ND: Tensor
    dweights_N: Tensor
    grads: tuple[Tensor | None, Tensor | None]
    """Of the packed gate and up, and of the packed down matrices, where they train."""


def _half_backward(
    kind: Kind, dy_TD: Tensor, x_TD: Tensor, half: Half, gate_up_N2f: Tensor, experts: Experts,
    needs: tuple[bool, ...],
) -> Gradients:  # fmt: skip
    products, activation = kind
    ops = row_ops(x_TD.device, activation)
    dy_ND = products.gather(dy_TD, half)
    dhidden_Nf = products.product(dy_ND, experts.down_proj, half)
    dgate_up_N2f, hidden_Nf, dweights_N = ops.swiglu_gradient(
        dhidden_Nf, gate_up_N2f, half.weights_N, half.num_rows, activation
    )
    dgate_up = ddown = None
    if needs[1]:
        ddown = products.outer(dy_ND, Rows(hidden_Nf), half)
    del dy_ND, dhidden_Nf, hidden_Nf
    if needs[0]:
        dgate_up = products.outer(Rows(dgate_up_N2f), products.gather(x_TD, half), half)
    dx_ND = products.product(Rows(dgate_up_N2f), experts.gate_up_proj, half)
    return Gradients(dx_ND, dweights_N, (dgate_up, ddown))
