"""How many parts each layer's tokens pass: more where leaving neurons out raises the loss more, at the same mean.

What leaving out costs is estimated from one sample of the dense model per layer. The neurons with the least mean
|h dL/dh| are dropped, the kept ones take over what a ridge regression can predict of them, and what is left, r, changes
the loss to first order by r . dL/dh. The mean square of that over the tokens is the empirical Fisher's estimate of the
rise of the Kullback-Leibler divergence from the dense model. It is taken from the mean magnitude, as of a normal
distribution: the squares themselves are those of a few tokens.

Shapes: T tokens, F neurons, G parts of f = F/G neurons, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lamella.calibrate.sample import LayerSample, need_gradient, top_neurons
from lamella.conversion.partition.reconstruct import dense_output, token_weights
from lamella.conversion.partition.ridge import RidgeProblem

STRENGTH = 0.3
"""Of the regression; the refit's choice in most layers."""
LEAST, MOST = 0.75, 1.5
"""Of the mean count: without these bounds the estimate trusts itself too far, and text of other kinds pays for it."""
PROBES = 13
"""So many counts are computed at most; between them the cost's logarithm is taken for a straight line."""
TINY = 1e-300
"""Keeps the logarithm of a layer without any cost finite."""


def counts(parts: int, active: int, shared: int = 0) -> range:
    """The numbers of parts that a layer may have active: at least one is left out, and one beside the shared ones is
    chosen."""
    least, most = math.ceil(LEAST * active), min(math.floor(MOST * active), parts - 1)
    return range(max(least, shared + 1), max(active, most) + 1)


def costs(sample: LayerSample, parts: int, candidates: Sequence[int]) -> Tensor:
    """float64, one for each candidate: about how much the loss rises where a layer has so many parts active."""
    h_TF, dh_TF = sample.h_TF, need_gradient(sample, "allocation by sensitivity")
    F = h_TF.shape[1]
    importance_F = (h_TF * dh_TF).abs().mean(0)
    problem = RidgeProblem(h_TF, token_weights(dense_output(sample)))
    alpha = STRENGTH * problem.gram_DD.diagonal().mean().clamp(min=1e-12)

    def cost(count: int) -> float:
        is_kept_F = torch.zeros(F, dtype=torch.bool)
        is_kept_F[top_neurons(importance_F, count * F // parts)] = True
        kept, dropped = is_kept_F.nonzero().flatten(), (~is_kept_F).nonzero().flatten()
        system = problem.gram_DD[kept][:, kept]
        system.diagonal().add_(alpha)
        slopes = torch.cholesky_solve(problem.gram_DD[kept][:, dropped], torch.linalg.cholesky(system)).float()
        left = problem.centred_TD[:, dropped] - problem.centred_TD[:, kept] @ slopes
        change_T = (left * dh_TF[:, dropped]).sum(1)
        return (math.pi / 2 * change_T.abs().mean(dtype=torch.float64).square()).item()

    places = np.linspace(0, len(candidates) - 1, min(PROBES, len(candidates))).round().astype(int)
    probed = [max(cost(candidates[i]), TINY) for i in places]
    return torch.from_numpy(np.exp(np.interp(np.arange(len(candidates)), places, np.log(probed))))


def allocate(cost_of_layers: Mapping[int, Sequence[float]], candidates: Sequence[int], active: int) -> dict[int, int]:
    """The count of each layer, their mean `active`, at the least total cost: exact, by dynamic programming.

    Args:
        cost_of_layers: by layer, the cost of each candidate.
        candidates: consecutive counts, `active` among them.
    """
    layers = sorted(cost_of_layers)
    spare = len(layers) * (active - candidates[0])
    # cheapest[s]: the least cost of the layers so far with s parts above the least count, and their counts
    cheapest: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer in layers:
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for used, (cost, chosen) in cheapest.items():
            for more, own in enumerate(cost_of_layers[layer]):
                total = used + more
                if total <= spare and (total not in longer or cost + own < longer[total][0]):
                    longer[total] = cost + own, (*chosen, candidates[more])
        cheapest = longer
    return dict(zip(layers, cheapest[spare][1], strict=True))
