"""Weights of decoding in fewer bytes than float32, by kernels that torch brings: a matrix that is called with rows.

Int8: a scale per output row, inputs and outputs rounded to bfloat16. Float16 (CPU): the
fbgemm kernel with float32 inputs and outputs, so that the weights' rounding is the only one; on a GPU int8 alone.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias, get_args

import torch
from torch import Tensor

from lamella.moe.seams import int8_product

PackedDtype: TypeAlias = Literal["int8", "float16"]
PACKED_DTYPES: tuple[PackedDtype, ...] = get_args(PackedDtype)


class Matrix(Protocol):
    """A matrix [N, K] that multiplies rows."""

    def __call__(self, x_MK: Tensor) -> Tensor:
        """The product [M, N], in the dtype of the rows."""
        ...

    def rounded(self, x_MK: Tensor) -> Tensor:
        """The rows in the dtype that the product takes: for several matrices of a kind in one call."""
        ...

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        ...


class Plain:
    """A matrix as it is."""

    def __init__(self, weight_NK: Tensor):
        self.weight_NK = weight_NK

    def __call__(self, x_MK: Tensor) -> Tensor:
        return torch.nn.functional.linear(x_MK, self.weight_NK)

    def rounded(self, x_MK: Tensor) -> Tensor:
        """As they are."""
        return x_MK

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        return self.weight_NK.nbytes


class Int8:
    """A matrix of whole numbers -127 .. 127 and a scale per row."""

    def __init__(self, values_NK: Tensor, scale_N: Tensor):
        self.values_NK, self.scale_N = values_NK, scale_N.to(torch.bfloat16)

    def __call__(self, x_MK: Tensor) -> Tensor:
        return int8_product(x_MK.to(torch.bfloat16), self.values_NK, self.scale_N).to(x_MK.dtype)

    def rounded(self, x_MK: Tensor) -> Tensor:
        """In bfloat16."""
        return x_MK.to(torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        return self.values_NK.nbytes + self.scale_N.nbytes


class Float16:
    """A matrix in half precision for float32 rows, packed as fbgemm wants it."""

    def __init__(self, weight_NK: Tensor):
        self.nbytes = 2 * weight_NK.numel()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight_NK.float().contiguous(), None)

    def __call__(self, x_MK: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x_MK.float(), self.packed).to(x_MK.dtype)

    def rounded(self, x_MK: Tensor) -> Tensor:
        """In float32."""
        return x_MK.float()


def rounded_to_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(values [..., N, K] int8, scale [..., N] bfloat16): the largest of each row becomes 127.

    The scale is rounded before it divides, so that what the product multiplies with is what was divided by.
    """
    weight_NK = weight_NK.float()
    scale_N = (weight_NK.abs().amax(dim=-1) / 127).clamp(min=1e-30).to(torch.bfloat16)
    values_NK = (weight_NK / scale_N.float()[..., None]).round().clamp(-127, 127).to(torch.int8)
    return values_NK, scale_N


def packed_matrix(weight_NK: Tensor, dtype: PackedDtype) -> Matrix:
    """The matrix in another dtype."""
    if dtype == "float16" and weight_NK.device.type == "cpu":
        return Float16(weight_NK)
    return Int8(*rounded_to_int8(weight_NK))
