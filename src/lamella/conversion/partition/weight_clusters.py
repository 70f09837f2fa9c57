"""Neurons with like input weights (MoEfication, arXiv 2110.01786): balanced k-means over the weight rows.

A gated neuron's row is its gate row and its up row, each of length 1, so that direction counts and size does not.
Without data the only importance is the weights' own: the shared neurons have the largest product of the norms of gate
row, up row and down column.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor

from lamella.architecture.sizes import Parts, check_parts
from lamella.calibrate.sample import FFN, LayerSample, Partition, partition_of, routed_neurons, top_neurons
from lamella.conversion.partition.clusters import balanced_kmeans


def weight_clusters(sample: LayerSample, parts: Parts, generator: torch.Generator) -> Partition:
    ffn = sample.ffn
    F = len(ffn.up_FD)
    f = check_parts(F, parts)
    shared_n = top_neurons(_norm_product(ffn), parts.num_shared * f)
    routed = routed_neurons(shared_n, F)
    _, expert_N = balanced_kmeans(_directions(ffn)[routed], parts.num_routed, generator)
    expert_F = torch.full((F,), -1)
    expert_F[routed] = expert_N
    return partition_of(expert_F, parts.num_routed)


def _directions(ffn: FFN) -> Tensor:
    """[F, 2D] (or [F, D] without a gate)."""
    rows = [w for w in (ffn.gate_FD, ffn.up_FD) if w is not None]
    return torch.cat([functional.normalize(w.float(), dim=1) for w in rows], dim=1)


def _norm_product(ffn: FFN) -> Tensor:
    norm_F = ffn.up_FD.float().norm(dim=1) * ffn.down_DF.float().norm(dim=0)
    return norm_F if ffn.gate_FD is None else norm_F * ffn.gate_FD.float().norm(dim=1)
