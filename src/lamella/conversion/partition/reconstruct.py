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


def token_weights(reference_TD: Tensor) -> Tensor:
    """[T], mean 1: one over each token's squared output, to which the median is added so that small outputs do not
    decide either. A few tokens, mostly a text's first, have outputs up to a thousand times those of others (massive
    activations, arXiv 2402.17762): in a plain sum of squares they alone would count."""
    squared_T = reference_TD.square().sum(1)
    weight_T = 1 / (squared_T + squared_T.median()).clamp(min=1e-30)
    return weight_T / weight_T.mean()


def relative_error(reference_TD: Tensor, y_TD: Tensor) -> float:
    """sum w |reference - y|^2 / sum w |reference|^2 with w of `token_weights`."""
    weight_T = token_weights(reference_TD)
    error, whole = ((of.square().sum(1) * weight_T).sum() for of in (reference_TD - y_TD, reference_TD))
    return (error / whole.clamp(min=1e-30)).item()
