"""Private names of torch that the maths touches. tests/titan/test_seams.py says when torch changes one."""

from __future__ import annotations

import torch
from torch import Tensor


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now leaves the graph for another one (`retain_graph`).

    A node may give a saved activation's memory back early only where it does not; torch tells nobody in public.
    """
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def int8_product(x_MK: Tensor, values_NK: Tensor, scale_N: Tensor) -> Tensor:
    """Return bfloat16 [M, N]: the product of bfloat16 rows with int8 rows and their scales, by the kernel that torch
    keeps for weights in 8 bits."""
    return torch._weight_int8pack_mm(x_MK, values_NK, scale_N)


def int4_packed(values_NK: Tensor) -> Tensor:
    """Int32 values 0 .. 15 in the order in which this machine's `int4_product` reads them, two to a byte; N is a
    multiple of 16."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(values_NK, 1)


def int4_product(x_MK: Tensor, packed_NK: Tensor, group: int, scales_GN2: Tensor) -> Tensor:
    """Return bfloat16 [M, N]: the product of bfloat16 rows with packed weights, by the kernel that torch keeps for
    weights in 4 bits on a CPU.

    Args:
        group: so many inputs of a row have a scale and a middle of their own; it divides K.
        scales_GN2: both, bfloat16.
    """
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x_MK, packed_NK, group, scales_GN2)
