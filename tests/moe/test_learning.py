"""The rate of each step, and the distance to a teacher."""

import math

import pytest
import torch

from lamella.moe import learning
from lamella.moe.learning import rate_at, summed_kl


def test_the_rate_rises_and_falls():
    rates = [rate_at(step, 20, least=0.1) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 19)))]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.1 < rates[-1] < 0.11
    assert rate_at(0, 1) == rate_at(0, 1, 0.1) == 1.0
    assert 0 < rate_at(19, 20) < 0.01  # the last step still moves something


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_in_chunks_is_the_formula(temperature, monkeypatch):
    monkeypatch.setattr(learning, "TOKENS_PER_CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    student_NV, teacher_NV = (torch.randn(10, 7, generator=generator) for _ in range(2))
    student_NV.requires_grad_()
    kept_N = torch.arange(10) != 3
    p, q = ((x / temperature).softmax(-1) for x in (teacher_NV, student_NV))
    expected_N = temperature**2 * (p * (p.log() - q.log())).sum(-1)
    assert torch.allclose(summed_kl(student_NV, teacher_NV, temperature), expected_N.sum(), rtol=1e-5)
    kl, expected = summed_kl(student_NV, teacher_NV, temperature, kept_N), expected_N[kept_N].sum()
    assert torch.allclose(kl, expected, rtol=1e-5)  # fp32, another order of summation
    (gradient,) = torch.autograd.grad(kl, student_NV)
    (direct,) = torch.autograd.grad(expected, student_NV)
    assert torch.allclose(gradient, direct, atol=1e-6)
    assert gradient[3].eq(0).all()
