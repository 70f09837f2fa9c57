"""Slicing: exact, invertible, and refused where it does not go even."""

import pytest
import torch
import torch.nn.functional as F

from lamella.architecture.sizes import check_slices
from lamella.errors import UserError
from lamella.moe.experts import gated_ffn
from lamella.moe.noise import noise_generator
from support.slicing import slice_ffn, unslice_ffn

D, WIDTH = 12, 48


@pytest.fixture
def ffn():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in [(WIDTH, D), (WIDTH, D), (D, WIDTH)])


@pytest.mark.parametrize("slices", [1, 2, 8, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unslicing_is_the_inverse_bit_for_bit(ffn, slices, dtype):
    ffn = tuple(w.to(dtype) for w in ffn)
    experts = slice_ffn(*ffn, slices)
    assert experts.gate_up_proj.shape == (slices, 2 * WIDTH // slices, D)
    assert experts.down_proj.shape == (slices, D, WIDTH // slices)
    assert all(torch.equal(a, b) for a, b in zip(unslice_ffn(experts), ffn, strict=True))


def test_a_slice_holds_its_neurons(ffn):
    gate, up, down = ffn
    experts = slice_ffn(*ffn, 4)
    assert torch.equal(experts.gate_up_proj[2], torch.cat([gate[24:36], up[24:36]]))
    assert torch.equal(experts.down_proj[2], down[:, 24:36])
    assert experts.down_proj.is_contiguous()


@pytest.mark.parametrize("slices", [1, 3, 8])
def test_the_sum_of_the_slices_is_the_ffn(ffn, slices):
    gate, up, down = (w.double() for w in ffn)
    x = torch.randn(30, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    experts = slice_ffn(gate, up, down, slices)
    total = sum(gated_ffn(x, *pair) for pair in zip(*experts, strict=True))
    torch.testing.assert_close(total, dense, rtol=0, atol=1e-12)  # fp64: 48 terms of size 100 in another order


@pytest.mark.parametrize("slices", [0, -8, 5, 7])
def test_uneven_slices_are_refused(ffn, slices):
    with pytest.raises(
        UserError, match=rf"width 48 is not divisible by {slices} slices; choose one of \[2, 3, 4, 6, 8"
    ):
        slice_ffn(*ffn, slices)
    assert check_slices(14336, 8) == 1792


def test_noise_depends_on_name_and_seed_alone():
    first = torch.randn(100, generator=noise_generator("a.weight", 0))
    torch.randn(1000)  # the global generator has no part in it
    assert torch.equal(first, torch.randn(100, generator=noise_generator("a.weight", 0)))
    for name, seed in [("b.weight", 0), ("a.weight", 1)]:
        other = torch.randn(100, generator=noise_generator(name, seed))
        assert torch.corrcoef(torch.stack([first, other]))[0, 1].abs() < 0.4  # 4 standard deviations (1/sqrt(100))
