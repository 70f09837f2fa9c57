"""Size-constrained k-means: Lloyd's algorithm whose assignment step is balanced (Bradley, Bennett and Demiriz 2000).

Shapes: N points of D numbers, E clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from lamella.conversion.partition.assign import balanced_assign

Metric = Literal["l2", "cosine"]
MAX_POINTS = 4096
"""At most this many points are clustered, drawn at random; the rest go to the nearest centroid."""
ROUNDS = 10


def balanced_kmeans(
    points_ND: Tensor, num_clusters: int, generator: torch.Generator, metric: Metric = "l2", rounds: int = ROUNDS
) -> tuple[Tensor, Tensor]:
    """Centroids [E, D] and the cluster of each point [N]; no cluster has more than ceil(N/E) points.

    The start is k-means++. With "cosine", points and centroids have length 1.
    """
    if metric == "cosine":
        points_ND = functional.normalize(points_ND, dim=1)
    centroids_ED = _spread_points(points_ND, num_clusters, generator)
    capacity = math.ceil(len(points_ND) / num_clusters)
    return balanced_lloyd(points_ND, centroids_ED, squared_distances, capacity, rounds, metric == "cosine")


def balanced_lloyd(
    points_ND: Tensor,
    centroids_ED: Tensor,
    distances: Callable[[Tensor, Tensor], Tensor],
    capacity: int,
    rounds: int,
    unit_length: bool = False,
) -> tuple[Tensor, Tensor]:
    """Centroids [E, D] and clusters [N] of at most `capacity` points, when nothing changes or after `rounds`."""
    cluster_N = None
    for _ in range(rounds):
        new_N = balanced_assign(distances(points_ND, centroids_ED), capacity)
        if cluster_N is not None and torch.equal(new_N, cluster_N):
            break
        cluster_N = new_N
        centroids_ED = group_means(points_ND, cluster_N, len(centroids_ED))
        if unit_length:
            centroids_ED = functional.normalize(centroids_ED, dim=1)
    assert cluster_N is not None
    return centroids_ED, cluster_N


def token_clusters(
    x_TD: Tensor, num_clusters: int, generator: torch.Generator, metric: Metric = "l2"
) -> tuple[Tensor, Tensor]:
    """Centroids [E, D] of balanced k-means over at most MAX_POINTS tokens, and every token's nearest one [T]."""
    drawn = torch.randperm(len(x_TD), generator=generator)[:MAX_POINTS]
    centroids_ED, _ = balanced_kmeans(x_TD[drawn], num_clusters, generator, metric)
    return centroids_ED, squared_distances(x_TD, centroids_ED, metric).argmin(1)


def squared_distances(points_ND: Tensor, centroids_ED: Tensor, metric: Metric = "l2") -> Tensor:
    """[N, E], less each point's own squared length (which changes no assignment)."""
    if metric == "cosine":
        points_ND = functional.normalize(points_ND, dim=1)
    return centroids_ED.square().sum(1) - 2 * points_ND @ centroids_ED.T


def group_means(points_ND: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """[E, D]: the mean of each group's points; zero for an empty group."""
    sums_ED = torch.zeros(num_groups, points_ND.shape[1]).index_add_(0, group_N, points_ND)
    return sums_ED / group_N.bincount(minlength=num_groups).clamp(min=1)[:, None]


def _spread_points(points_ND: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next one drawn in proportion to the squared distance."""
    chosen = torch.randint(len(points_ND), (1,), generator=generator)
    nearest_N = (points_ND - points_ND[chosen]).square().sum(1)
    for _ in range(count - 1):
        # Where every point is already chosen, all weights are 0: then any point will do.
        weight_N = nearest_N if nearest_N.sum() > 0 else torch.ones_like(nearest_N)
        new = torch.multinomial(weight_N, 1, generator=generator)
        nearest_N = torch.minimum(nearest_N, (points_ND - points_ND[new]).square().sum(1))
        chosen = torch.cat([chosen, new])
    return points_ND[chosen].clone()
