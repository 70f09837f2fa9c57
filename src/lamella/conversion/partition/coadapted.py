"""Partition and routing fitted to each other, in rounds: neurons go where a *linear* router sends the tokens that need
them.

Importance g_tn = |h_tn dL/dh_tn|. The shared neurons have the largest mean g. The others start from balanced k-means
clusters of the tokens. A round: mass_te = sum of g over e's neurons; ridge regression of the input onto the mass, and
its top K experts, are the routing; the affinity of neuron n to expert e is the mean g_n over the tokens that choose e;
neurons are assigned anew by the affinity, with capacities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.architecture.sizes import Parts, check_parts
from lamella.calibrate.sample import LayerSample, Partition, choose, partition_of, routed_neurons, top_neurons
from lamella.conversion.partition.assign import balanced_assign
from lamella.conversion.partition.clusters import token_clusters
from lamella.conversion.partition.gradient import gradient_mass
from lamella.conversion.partition.ridge import RidgeProblem

ROUNDS = 4
RIDGE_STRENGTH = 0.1


def coadapted(sample: LayerSample, parts: Parts, generator: torch.Generator, rounds: int = ROUNDS) -> Partition:
    F = len(sample.ffn.up_FD)
    f = check_parts(F, parts)
    mass_TF = gradient_mass(sample, "coadapted")
    shared_n = top_neurons(mass_TF.mean(0), parts.num_shared * f)
    routed = routed_neurons(shared_n, F)
    expert_F = torch.full((F,), -1)
    expert_F[routed] = _coadapt(mass_TF[:, routed], sample.x_TD, parts, f, generator, rounds)
    return partition_of(expert_F, parts.num_routed)


def _coadapt(
    mass_TN: Tensor, x_TD: Tensor, parts: Parts, capacity: int, generator: torch.Generator, rounds: int
) -> Tensor:
    """[N]: the expert of each routed neuron."""
    E = parts.num_routed
    _, cluster_T = token_clusters(x_TD, E, generator)
    expert_N = balanced_assign(-affinity(mass_TN, torch.nn.functional.one_hot(cluster_T, E).float()), capacity)
    problem = RidgeProblem(x_TD)
    for _ in range(rounds):
        member_NE = torch.nn.functional.one_hot(expert_N, E).float()
        routing = problem.fit(mass_TN @ member_NE, RIDGE_STRENGTH)
        chosen_TK = choose(routing(x_TD), parts.num_chosen)
        chosen_TE = torch.zeros(len(x_TD), E).scatter_(1, chosen_TK, 1.0)
        expert_N = balanced_assign(-affinity(mass_TN, chosen_TE), capacity)
    return expert_N


def affinity(mass_TN: Tensor, chosen_TE: Tensor) -> Tensor:
    """[N, E]: a neuron's mean importance over the tokens that choose the expert, less its mean over the experts."""
    mean_NE = mass_TN.T @ chosen_TE / chosen_TE.sum(0).clamp(min=1)
    return mean_NE - mean_NE.mean(1, keepdim=True)
