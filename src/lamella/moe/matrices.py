"""Weights of decoding in fewer bytes than float32, by kernels that torch brings: a matrix that is called with rows.

Int8: a scale per output row, inputs and outputs rounded to bfloat16. Int4: a scale and a middle per GROUP inputs of an
output row, else alike. Float16 (CPU): the fbgemm kernel with float32 inputs and outputs, so that the weights' rounding
is the only one; on a GPU int8 takes its place.

Shapes: M rows, K inputs, N outputs, G groups of GROUP inputs, the last of which may be filled up.
"""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.moe.seams import int4_packed, int4_product, int8_product

PackedDtype: TypeAlias = Literal["int8", "float16", "int4"]
PACKED_DTYPES: tuple[PackedDtype, ...] = get_args(PackedDtype)
RoundedDtype: TypeAlias = Literal["int8", "int4"]
ROUNDED_DTYPES: tuple[RoundedDtype, ...] = get_args(RoundedDtype)
GROUP = 32
"""Inputs that share a scale in int4: with the middle, one more bit a weight."""


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
        return F.linear(x_MK, self.weight_NK)

    def rounded(self, x_MK: Tensor) -> Tensor:
        """As they are."""
        return x_MK

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        return self.weight_NK.nbytes


class Int8:
    """A matrix of whole numbers -127 .. 127 and a scale per row.

    It is filled up to whole groups of inputs: the kernel reads past the end of rows of another length.
    """

    def __init__(self, values_NK: Tensor, scale_N: Tensor):
        self.values_NK, self.scale_N = _filled(values_NK), scale_N.to(torch.bfloat16)

    def __call__(self, x_MK: Tensor) -> Tensor:
        return int8_product(_filled(self.rounded(x_MK)), self.values_NK, self.scale_N).to(x_MK.dtype)

    def rounded(self, x_MK: Tensor) -> Tensor:
        """In bfloat16."""
        return x_MK.to(torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        return self.values_NK.nbytes + self.scale_N.nbytes


class Int4:
    """A matrix of whole numbers 0 .. 15; a weight is (number - 8) times its group's scale and the group's middle.

    Args:
        pairs_NB: uint8, two numbers to a byte, the first in the lower half; filled up to whole groups.
        scales_NG2: bfloat16, scale and middle.
        width: K.
    """

    def __init__(self, pairs_NB: Tensor, scales_NG2: Tensor, width: int):
        self.width = width
        self.has_kernel = pairs_NB.device.type == "cpu" and len(pairs_NB) % 16 == 0
        if self.has_kernel:
            self.values = int4_packed(_unpacked(pairs_NB, torch.int32))
            self.scales = scales_NG2.transpose(0, 1).contiguous()
        else:
            self.values, self.scales = pairs_NB, scales_NG2

    def __call__(self, x_MK: Tensor) -> Tensor:
        if not self.has_kernel:
            weight_NK = dequantised_int4(self.values, self.scales, self.width)
            return F.linear(x_MK.float(), weight_NK).to(x_MK.dtype)
        return int4_product(_filled(self.rounded(x_MK)), self.values, GROUP, self.scales).to(x_MK.dtype)

    def rounded(self, x_MK: Tensor) -> Tensor:
        """In bfloat16."""
        return x_MK.to(torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """What its weights take."""
        return self.values.nbytes + self.scales.nbytes


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


def dequantised_int8(values_NK: Tensor, scale_N: Tensor) -> Tensor:
    """The float32 [..., N, K] that these stand for."""
    return values_NK.float() * scale_N.float()[..., None]


def rounded_to_int4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """(pairs [..., N, ceil(K/GROUP) GROUP/2] uint8, scales [..., N, G, 2] bfloat16), as `Int4` has them: the least of
    each group becomes 0, the largest 15."""
    filled = _filled(weight_NK.float()).unflatten(-1, (-1, GROUP))
    least, largest = filled.aminmax(dim=-1)
    # both are rounded before they are divided by, so that what the product multiplies with is what was divided by
    scale_NG = ((largest - least) / 15).clamp(min=1e-30).to(torch.bfloat16)
    middle_NG = (least + 8 * scale_NG.float()).to(torch.bfloat16)
    values = (filled - middle_NG.float()[..., None]) / scale_NG.float()[..., None] + 8
    first, second = values.round().clamp(0, 15).to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2)).unbind(-1)
    return first | second << 4, torch.stack([scale_NG, middle_NG], dim=-1)


def dequantised_int4(pairs_NB: Tensor, scales_NG2: Tensor, width: int) -> Tensor:
    """The float32 [..., N, K] that these stand for; K is `width`."""
    values = _unpacked(pairs_NB, torch.float32).unflatten(-1, (-1, GROUP))
    scale, middle = scales_NG2.float()[..., None].unbind(-2)
    return values.sub_(8).mul_(scale).add_(middle).flatten(-2)[..., :width]


def rounded(weight_NK: Tensor, dtype: RoundedDtype) -> tuple[Tensor, Tensor]:
    """(numbers, scales) as `rounded_to_int8` or `rounded_to_int4` gives them."""
    return rounded_to_int8(weight_NK) if dtype == "int8" else rounded_to_int4(weight_NK)


def rounded_shapes(shape: tuple[int, ...], dtype: RoundedDtype) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the numbers and of the scales that weights [..., N, K] are rounded to."""
    *rest, K = shape
    G = -(-K // GROUP)
    if dtype == "int8":
        return [(torch.int8, shape), (torch.bfloat16, tuple(rest))]
    return [(torch.uint8, (*rest, G * GROUP // 2)), (torch.bfloat16, (*rest, G, 2))]


def dequantised(values: Tensor, scales: Tensor, width: int) -> Tensor:
    """The float32 [..., N, K] that rounded numbers stand for; K is `width`."""
    return dequantised_int8(values, scales) if values.dtype == torch.int8 else dequantised_int4(values, scales, width)


def rounded_matrix(values: Tensor, scales: Tensor, width: int) -> Matrix:
    """The matrix [N, K] of rounded numbers; K is `width`."""
    return Int8(values, scales) if values.dtype == torch.int8 else Int4(values, scales, width)


def _filled(rows: Tensor) -> Tensor:
    """With zeros behind each row up to whole groups."""
    missing = -rows.shape[-1] % GROUP
    return F.pad(rows, (0, missing)) if missing else rows.contiguous()


def _unpacked(pairs_NB: Tensor, dtype: torch.dtype) -> Tensor:
    values_NB2 = torch.empty(*pairs_NB.shape, 2, dtype=dtype, device=pairs_NB.device)
    values_NB2[..., 0], values_NB2[..., 1] = pairs_NB & 15, pairs_NB >> 4
    return values_NB2.flatten(-2)


def packed_matrix(weight_NK: Tensor, dtype: PackedDtype) -> Matrix:
    """The matrix in another dtype."""
    if dtype == "float16" and weight_NK.device.type == "cpu":
        return Float16(weight_NK)
    return rounded_matrix(*rounded(weight_NK, "int4" if dtype == "int4" else "int8"), weight_NK.shape[-1])
