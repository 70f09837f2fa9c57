"""Neurons of a dense FFN into shared and routed experts, and routers for them: tensor functions of one layer at a time.

partition = PARTITIONS["coadapted"](sample, Parts(16, 3, 8), generator)
router = ROUTERS["ridge"](sample, partition, 5, generator)
"""

from __future__ import annotations

from lamella.conversion.partition.coactivation import coactivation
from lamella.conversion.partition.coadapted import coadapted
from lamella.conversion.partition.contiguous import contiguous
from lamella.conversion.partition.gradient import gradient_max, gradient_sharing
from lamella.conversion.partition.router_analytic import analytic_router
from lamella.conversion.partition.router_kmeans import kmeans_router
from lamella.conversion.partition.router_ridge import ridge_router
from lamella.conversion.partition.routers_plain import random_router, zero_router
from lamella.conversion.partition.search import PartitionMethod, RouterMethod
from lamella.conversion.partition.shuffled import shuffled
from lamella.conversion.partition.weight_clusters import weight_clusters

PARTITIONS: dict[str, PartitionMethod] = {
    "contiguous": contiguous,
    "random": shuffled,
    "kmeans": weight_clusters,
    "coactivation": coactivation,
    "gradient-max": gradient_max,
    "gradient-sharing": gradient_sharing,
    "coadapted": coadapted,
}
ROUTERS: dict[str, RouterMethod] = {
    "zero": zero_router,
    "random": random_router,
    "kmeans": kmeans_router,
    "analytic": analytic_router,
    "ridge": ridge_router,
}
NEEDS_SAMPLE = frozenset({"coactivation", "gradient-max", "gradient-sharing", "coadapted"})
"""Partitions that look at calibration tokens; the others take `weights_only(ffn)`."""
NEEDS_GRADIENT = frozenset({"gradient-max", "gradient-sharing", "coadapted"})
"""Partitions that need the sample's dh."""
ROUTERS_NEED_SAMPLE = frozenset({"kmeans", "analytic", "ridge"})
