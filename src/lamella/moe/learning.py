"""What learning needs wherever it happens: how fast to go at a step, and how far a student is from its teacher.

Shapes: N tokens, C tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WARMUP = 0.1
"""Of the steps: the rate rises over this share of them."""
TOKENS_PER_CHUNK = 512


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

    A chunk of tokens at a time, whose float32 probabilities the backward pass computes again: of whole samples they
    would take several times the memory of the logits.

    Args:
        kept_N: which tokens count; None: all.
    """
    total = student_NV.new_zeros((), dtype=torch.float32)
    kept = torch.ones(len(student_NV), dtype=torch.bool, device=student_NV.device) if kept_N is None else kept_N
    chunks = zip(*(t.split(TOKENS_PER_CHUNK) for t in (student_NV, teacher_NV, kept)), strict=True)
    for student_CV, teacher_CV, kept_C in chunks:
        total = total + checkpoint(_kl, student_CV, teacher_CV, kept_C, temperature, use_reentrant=False)
    return temperature**2 * total


def _kl(student_CV: Tensor, teacher_CV: Tensor, kept_C: Tensor, temperature: float) -> Tensor:
    student_CV, teacher_CV = ((x.float() / temperature).log_softmax(dim=-1) for x in (student_CV, teacher_CV))
    kl_C = F.kl_div(student_CV, teacher_CV, reduction="none", log_target=True).sum(dim=-1)
    return (kl_C * kept_C).sum()
