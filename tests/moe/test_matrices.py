"""Matrices in fewer bits multiply as the float32 matrices that they stand for, and those are near what was rounded."""

from __future__ import annotations

import pytest
import torch

from lamella.moe.matrices import (
    GROUP,
    dequantised_int4,
    dequantised_int8,
    packed_matrix,
    rounded_to_int4,
    rounded_to_int8,
)

# Kernels round inputs and outputs to bfloat16, by 2^-9 of each, and add up in float32.
BFLOAT16 = 4e-3
SHAPES = [(48, 64), (16, 32), (32, 40), (24, 64), (7, 5), (384, 576)]
"""Rows that the kernel for int4 takes and such that it does not; whole groups and others."""


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_products_are_those_of_the_matrix_that_it_stands_for(dtype, shape, rows):
    torch.manual_seed(0)
    weight_NK, x_MK = torch.randn(shape), torch.randn(rows, shape[1])
    if dtype == "int8":
        stands_for = dequantised_int8(*rounded_to_int8(weight_NK))
    else:
        stands_for = dequantised_int4(*rounded_to_int4(weight_NK), shape[1])
    matrix = packed_matrix(weight_NK, dtype)
    for given in (x_MK, x_MK.bfloat16()):
        found, expected = matrix(given), given.float() @ stands_for.t()
        assert found.dtype == given.dtype
        assert (found.float() - expected).norm() < BFLOAT16 * expected.norm()
        assert (matrix(matrix.rounded(given)).float() - expected).norm() < 2 * BFLOAT16 * expected.norm()


@pytest.mark.parametrize("shape", [*((2, 3, *shape) for shape in SHAPES), *SHAPES])
def test_a_weight_is_half_a_step_from_what_it_becomes(shape):
    """And what rounding scale and middle to bfloat16, by 2^-9 of each, adds at the ends of a group."""
    torch.manual_seed(0)
    weight = torch.randn(shape) + 0.3
    pairs, scales = rounded_to_int4(weight)
    groups = -(-shape[-1] // GROUP)
    assert (pairs.dtype, pairs.shape) == (torch.uint8, (*shape[:-1], groups * GROUP // 2))
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (*shape[:-1], groups, 2))
    scale, middle = scales.float().repeat_interleave(GROUP, dim=-2)[..., : shape[-1], :].unbind(-1)
    error = (dequantised_int4(pairs, scales, shape[-1]) - weight).abs()
    assert (error <= scale / 2 + 2**-9 * (8 * scale + middle.abs()) + 1e-6).all()
    assert (error > scale / 4).any()


def test_what_has_no_steps_stays():
    for constant in (0.0, 1.0, -0.5):
        weight = torch.full((16, 2 * GROUP), constant)
        assert dequantised_int4(*rounded_to_int4(weight), 2 * GROUP).equal(weight)


def test_int4_takes_five_bits_a_weight_and_int8_eight():
    weight = torch.randn(64, 8 * GROUP)
    assert packed_matrix(weight, "int4").nbytes == weight.numel() * 5 // 8
    assert packed_matrix(weight, "int8").nbytes == weight.numel() + 2 * 64
