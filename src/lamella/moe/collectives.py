"""Two collectives with gradients, each the other's backward pass; they run on NCCL and on gloo.

torch's own functional ones give a wrapper that waits when it is used, which a custom kernel does not do.

Shapes: n rows of this rank, P ranks, N = P*n rows of all, by rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from lamella.moe.autograd import Context


def gather_rows(x_n: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's rows, in the order of the ranks: [n, ...] -> [P*n, ...]."""
    return _Gather.apply(x_n, group)


def sum_scatter_rows(x_N: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's rows of the sum over ranks: [P*n, ...] -> [n, ...]."""
    return _SumScatter.apply(x_N, group)


def _gather(x_n: Tensor, group: dist.ProcessGroup) -> Tensor:
    x_N = x_n.new_empty(x_n.shape[0] * group.size(), *x_n.shape[1:])
    dist.all_gather_into_tensor(x_N, x_n.contiguous(), group=group)
    return x_N


def _sum_scatter(x_N: Tensor, group: dist.ProcessGroup) -> Tensor:
    x_n = x_N.new_empty(x_N.shape[0] // group.size(), *x_N.shape[1:])
    dist.reduce_scatter_tensor(x_n, x_N.contiguous(), group=group)
    return x_n


class GroupContext(Context):
    """What both collectives keep: the ranks that take part."""

    group: dist.ProcessGroup


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: GroupContext, x_n: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x_n, group)

    @staticmethod
    def backward(ctx: GroupContext, gradient_N: Tensor) -> tuple[Tensor, None]:
        return _sum_scatter(gradient_N, ctx.group), None


class _SumScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: GroupContext, x_N: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _sum_scatter(x_N, group)

    @staticmethod
    def backward(ctx: GroupContext, gradient_n: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient_n, ctx.group), None
