"""K-means gate (LLaMA-MoE-v2, arXiv 2411.15708): router rows are the centroids of size-constrained clusters of tokens.

The nearest centroid of x by l2 is the largest x·c - |c|^2/2, so the bias is -|c|^2/2; by cosine it is the largest x·c
with |c| = 1, without a bias. Clusters are given to the experts by linear assignment on what each expert's neurons put
out for the cluster's tokens: for a partition made without these clusters the order would be chance.
"""

from __future__ import annotations

import torch

from lamella.calibrate.sample import LayerSample, Partition, RouterInit, expert_norms
from lamella.conversion.partition.assign import balanced_assign
from lamella.conversion.partition.clusters import Metric, group_means, token_clusters


def kmeans_router(
    sample: LayerSample,
    partition: Partition,
    num_chosen: int,
    generator: torch.Generator,
    metric: Metric = "l2",
) -> RouterInit:
    E = len(partition.experts_Ef)
    centroids_ED, cluster_T = token_clusters(sample.x_TD, E, generator, metric)
    norm_TE = expert_norms(sample, partition)
    # Rows: clusters; columns: experts, each relative to its own mean, or one loud expert would decide alone.
    gain_CE = group_means(norm_TE / norm_TE.mean(0).clamp(min=1e-30), cluster_T, E)
    expert_C = balanced_assign(-gain_CE, 1)
    weight_ED = torch.empty_like(centroids_ED)
    weight_ED[expert_C] = centroids_ED
    bias_E = torch.zeros(E) if metric == "cosine" else -weight_ED.square().sum(1) / 2
    return RouterInit(weight_ED, bias_E)
