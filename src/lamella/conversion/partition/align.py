"""Bring a converted layer's output back to the dense layer's statistics, from outputs on calibration tokens.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """y -> scale * y + bias: rows of the down projections times scale, and an output bias."""

    scale_D: Tensor
    bias_D: Tensor


def alignment(reference_TD: Tensor, y_TD: Tensor) -> Alignment:
    """Each channel's mean and variance as in the reference (LLaMA-MoE-v2, arXiv 2411.15708):
    m = sqrt(var_ref / var), b = mean_ref - m mean. A channel that does not vary keeps scale 1."""
    variance_D = y_TD.var(0)
    scale_D = torch.where(variance_D > 0, (reference_TD.var(0) / variance_D.clamp(min=1e-30)).sqrt(), 1.0)
    return Alignment(scale_D, reference_TD.mean(0) - scale_D * y_TD.mean(0))


def residual_bias(reference_TD: Tensor, y_TD: Tensor) -> Tensor:
    """[D]: the mean of what the experts that were not chosen would have added."""
    return (reference_TD - y_TD).mean(0)
