"""CMoE (arXiv 2502.04416): neurons that fire on the same tokens belong together.

A token marks the 10 neurons with the largest |h|, where h is computed from inputs and weight rows of length 1, so that
no neuron is marked for its weights' size. The most often marked neurons are shared; the others are clustered by the L1
distance of their marker columns, balanced, starting from the most often marked of them.

For a binary marker m and a centroid c in [0, 1]: |m - c| = m + c - 2 m c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lamella.architecture.sizes import Parts, check_parts
from lamella.calibrate.sample import FFN, LayerSample, Partition, hidden, partition_of, routed_neurons, top_neurons
from lamella.conversion.partition.clusters import balanced_lloyd

MARKED_PER_TOKEN = 10
ROUNDS = 8


def coactivation(sample: LayerSample, parts: Parts, generator: torch.Generator) -> Partition:
    F = len(sample.ffn.up_FD)
    f = check_parts(F, parts)
    markers_FT = marker_columns(sample)
    shared_n = top_neurons(markers_FT.sum(1), parts.num_shared * f)
    routed = routed_neurons(shared_n, F)
    expert_F = torch.full((F,), -1)
    expert_F[routed] = _cluster(markers_FT[routed], parts.num_routed, f)
    return partition_of(expert_F, parts.num_routed)


def marker_columns(sample: LayerSample) -> Tensor:
    """float [F, T]: 1 where the neuron is among the token's top ones."""
    ffn = sample.ffn
    unit = FFN(
        None if ffn.gate_FD is None else functional.normalize(ffn.gate_FD, dim=1),
        functional.normalize(ffn.up_FD, dim=1),
        ffn.down_DF,
        activation=ffn.activation,
    )
    h_TF = hidden(unit, functional.normalize(sample.x_TD, dim=1)).abs()
    top_TM = h_TF.topk(min(MARKED_PER_TOKEN, h_TF.shape[1]), dim=1).indices
    return torch.zeros_like(h_TF).scatter_(1, top_TM, 1.0).T.contiguous()


def marker_distances(markers_FT: Tensor, centroids_ET: Tensor) -> Tensor:
    """[F, E]: L1."""
    return markers_FT.sum(1, keepdim=True) + centroids_ET.sum(1) - 2 * markers_FT @ centroids_ET.T


def _cluster(markers_NT: Tensor, num_experts: int, capacity: int) -> Tensor:
    most_marked = markers_NT.sum(1).argsort(descending=True, stable=True)[:num_experts]
    return balanced_lloyd(markers_NT, markers_NT[most_marked], marker_distances, capacity, ROUNDS)[1]
