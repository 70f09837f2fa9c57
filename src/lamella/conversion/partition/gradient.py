"""Gradient splits (LLaMA-MoE-v2, arXiv 2411.15708): an expert takes the neurons its cluster of tokens needs.

Importance of neuron n to the tokens of cluster e, clusters from size-constrained k-means on the FFN's input:

    S[e, n] = mean over tokens t of cluster e of |h_tn dL/dh_tn|

"max": the highest remaining (e, n) goes to e while e is not full. "sharing": each expert takes its own top f neurons,
so some are in several experts and some in none. Shared parts are the paper's residual expert ("Gradient Split Plus"):
each cluster lists its top f remaining neurons, those on the most lists are shared, ties by index, until the part is
full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.architecture.sizes import Parts, check_parts
from lamella.calibrate.sample import LayerSample, Partition, need_gradient, partition_of, routed_neurons
from lamella.conversion.partition.clusters import group_means, token_clusters


def gradient_max(sample: LayerSample, parts: Parts, generator: torch.Generator) -> Partition:
    importance_EF, shared_n, f = _importance_and_shared(sample, parts, generator)
    F = importance_EF.shape[1]
    routed = routed_neurons(shared_n, F)
    expert_F = torch.full((F,), -1)
    expert_F[routed] = _greedy(importance_EF[:, routed], f)
    return partition_of(expert_F, parts.num_routed)


def gradient_sharing(sample: LayerSample, parts: Parts, generator: torch.Generator) -> Partition:
    """Where every part is active it splits as `gradient_max`: a neuron in two experts would count twice."""
    if parts.num_active == parts.num_parts:
        return gradient_max(sample, parts, generator)
    importance_EF, shared_n, f = _importance_and_shared(sample, parts, generator)
    importance_EF[:, shared_n] = -1.0  # below every importance, and f <= F - n others remain
    return Partition(shared_n, importance_EF.topk(f, dim=1).indices.sort(dim=1).values)


def gradient_mass(sample: LayerSample, method: str) -> Tensor:
    """[T, F]: |h dL/dh|, the first-order change of the loss if the neuron were off."""
    return (sample.h_TF * need_gradient(sample, method)).abs()


def _importance_and_shared(sample: LayerSample, parts: Parts, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    """S [E, F], the shared neurons [n], neurons per part."""
    f = check_parts(len(sample.ffn.up_FD), parts)
    mass_TF = gradient_mass(sample, "a gradient partition")
    _, cluster_T = token_clusters(sample.x_TD, parts.num_routed, generator)
    importance_EF = group_means(mass_TF, cluster_T, parts.num_routed)
    return importance_EF, _residual(importance_EF, parts.num_shared * f, f), f


def _residual(importance_EF: Tensor, count: int, list_length: int) -> Tensor:
    """The `count` neurons, ascending, that are on the most clusters' lists of the top `list_length` remaining ones."""
    remaining_EF = importance_EF.clone()
    F = importance_EF.shape[1]
    shared: list[int] = []
    while len(shared) < count:
        listed_EM = remaining_EF.topk(min(list_length, F - len(shared)), dim=1).indices
        votes_F = listed_EM.flatten().bincount(minlength=F)
        order = votes_F.argsort(descending=True, stable=True)
        new = order[: int((votes_F > 0).sum())][: count - len(shared)].tolist()
        shared += new
        remaining_EF[:, new] = -1.0
    return torch.tensor(sorted(shared), dtype=torch.int64)


def _greedy(importance_EN: Tensor, capacity: int) -> Tensor:
    """[N]: the expert of each neuron."""
    E, N = importance_EN.shape
    expert_N, room = [-1] * N, [capacity] * E
    for pair in importance_EN.flatten().argsort(descending=True, stable=True).tolist():
        e, n = divmod(pair, N)
        if expert_N[n] < 0 and room[e]:
            expert_N[n] = e
            room[e] -= 1
    return torch.tensor(expert_N)
