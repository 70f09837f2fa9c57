"""The layer's output under a routing, and its distance from the dense one.

Shapes: T tokens, D width, F neurons, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.calibrate.sample import LayerSample, Partition, membership, output


def reconstruct(sample: LayerSample, partition: Partition, ids_TK: Tensor) -> Tensor:
    """y [T, D] = shared(x) + sum over the chosen experts, with unit gates, plus the dense output bias."""
    return output(sample.ffn, masked_hidden(sample, partition, ids_TK))


def masked_hidden(sample: LayerSample, partition: Partition, ids_TK: Tensor) -> Tensor:
    """[T, F]: h times how often the token computes the neuron: 0 or 1, more only where experts overlap."""
    F = sample.h_TF.shape[1]
    chosen_TE = torch.zeros(len(ids_TK), len(partition.experts_Ef)).scatter_(1, ids_TK, 1.0)
    count_TF = chosen_TE @ membership(partition, F)
    count_TF[:, partition.shared_n] += 1.0
    return sample.h_TF * count_TF


def dense_output(sample: LayerSample) -> Tensor:
    """y [T, D] of the dense layer."""
    return output(sample.ffn, sample.h_TF)


def relative_error(reference_TD: Tensor, y_TD: Tensor) -> float:
    """sum |reference - y|^2 / sum |reference|^2."""
    return ((reference_TD - y_TD).square().sum() / reference_TD.square().sum().clamp(min=1e-30)).item()
