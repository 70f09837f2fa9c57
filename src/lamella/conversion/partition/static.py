"""Structured pruning without routing: the two baselines that a routed partition has to beat.

static  keep the most important neurons.
flap    (FLAP, arXiv 2312.11983) what varies cannot be replaced by a constant: keep the largest var(h_n) |down_n|^2
        and put the mean output of the dropped neurons into a bias.

Shapes: T tokens, D width, F neurons, n = A*f kept neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.calibrate.sample import LayerSample, output, routed_neurons, top_neurons
from lamella.conversion.partition.gradient import gradient_mass
from lamella.errors import check_choice


class Kept(NamedTuple):
    neurons_n: Tensor
    """int64, ascending."""
    bias_D: Tensor
    """It is added to the output, beside the dense output bias."""


def mean_output(sample: LayerSample) -> Tensor:
    """[F]: mean |h_n| times |down_n|."""
    return sample.h_TF.abs().mean(0) * sample.ffn.down_DF.norm(dim=0)


def mean_gradient(sample: LayerSample) -> Tensor:
    """[F]: mean |h_n dL/dh_n|."""
    return gradient_mass(sample, "importance by gradient").mean(0)


def fluctuation(sample: LayerSample) -> Tensor:
    """[F]: var(h_n) |down_n|^2."""
    return sample.h_TF.var(0) * sample.ffn.down_DF.square().sum(0)


def gradient_fluctuation(sample: LayerSample) -> Tensor:
    """[F]: mean |(h_n - mean h_n) dL/dh_n|: what the loss feels of the part that a bias cannot replace."""
    gradient_mass(sample, "importance by gradient")  # refuses a sample without gradients
    assert sample.dh_TF is not None
    return ((sample.h_TF - sample.h_TF.mean(0)) * sample.dh_TF).abs().mean(0)


IMPORTANCES: dict[str, Callable[[LayerSample], Tensor]] = {
    "output": mean_output,
    "gradient": mean_gradient,
    "fluctuation": fluctuation,
    "gradient-fluctuation": gradient_fluctuation,
}


def static(sample: LayerSample, count: int, importance: str = "gradient") -> Kept:
    """The `count` most important neurons, and no bias."""
    return Kept(top_neurons(_importance(importance)(sample), count), torch.zeros(len(sample.ffn.down_DF)))


def flap(sample: LayerSample, count: int, importance: str = "fluctuation") -> Kept:
    """The `count` most important neurons, and the mean output of the others as the bias."""
    kept_n = static(sample, count, importance).neurons_n
    dropped = routed_neurons(kept_n, sample.h_TF.shape[1])
    return Kept(kept_n, sample.ffn.down_DF[:, dropped] @ sample.h_TF[:, dropped].mean(0))


def kept_output(sample: LayerSample, kept: Kept) -> Tensor:
    """y [T, D] of the pruned layer."""
    mask_F = torch.zeros(sample.h_TF.shape[1])
    mask_F[kept.neurons_n] = 1.0
    return output(sample.ffn, sample.h_TF * mask_F) + kept.bias_D


def _importance(name: str) -> Callable[[LayerSample], Tensor]:
    check_choice("importance", name, IMPORTANCES)
    return IMPORTANCES[name]
