"""What learning needs wherever it happens: how fast to go at a step, and how far a student is from its teacher.

Shapes: N tokens, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

WARMUP = 0.1
"""Of the steps: the rate rises over this share of them."""
TOKENS_PER_CHUNK = 128
"""Few: what is made of a chunk stays in a cache."""


def rate_at(step: int, steps: int, least: float = 0.0) -> float:
    """The share of the largest learning rate at a step, from 0: it rises, then falls along a cosine.

    Args:
        least: the share that it falls to, reached one step behind the last.
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (steps + 1 - warmup)))


def summed_kl(student_NV: Tensor, teacher_NV: Tensor, temperature: float = 1.0, kept_N: Tensor | None = None) -> Tensor:
    """Sum over tokens of temperature^2 * KL(teacher || student), both softened by the temperature (arXiv 1503.02531).

    The gradient is computed along with the sum, a chunk of tokens at a time: of whole samples the float32 probabilities
    would take several times the memory of the logits. It can be asked for once.

    Args:
        kept_N: which tokens count; None: all.
    """
    kept = torch.ones(len(student_NV), dtype=torch.bool, device=student_NV.device) if kept_N is None else kept_N
    return cast("Tensor", _SummedKL.apply(student_NV, teacher_NV, kept, temperature))


class _SummedKL(torch.autograd.Function):
    """The gradient is that of the student's logits: temperature * (its probabilities - the teacher's)."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, kept_N: Tensor, temperature: float) -> Tensor:
        gradient_NV = torch.empty_like(student_NV)
        total = student_NV.new_zeros((), dtype=torch.float32)
        chunks = (t.split(TOKENS_PER_CHUNK) for t in (student_NV, teacher_NV, kept_N, gradient_NV))
        for student_CV, teacher_CV, kept_C, gradient_CV in zip(*chunks, strict=True):
            log_q_CV, log_p_CV = ((x.float() / temperature).log_softmax(dim=-1) for x in (student_CV, teacher_CV))
            p_CV = log_p_CV.exp()
            total += (log_p_CV.sub_(log_q_CV).mul_(p_CV).sum(dim=-1) * kept_C).sum()
            gradient_CV.copy_(log_q_CV.exp_().sub_(p_CV).mul_(temperature * kept_C[:, None]))
        ctx.save_for_backward(gradient_NV)
        return temperature**2 * total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(grads[0]), None, None, None
