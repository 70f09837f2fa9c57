"""Router by ridge regression of the layer's input onto what each expert would contribute, log |W_down,e h_e|.

The logarithm, since the choice among a token's experts is one of ratios, and a few tokens with outsized outputs would
decide a fit of the norms. Minimising the dropped energy by gradient descent came out worse than ridge regression,
logistic regression onto the oracle's choice no better. The strength of the regularisation is the one whose top K
reconstruct the output best on held-out tokens; the last fit uses all tokens.

Shapes: T tokens, D width, E experts, K chosen.
"""

from __future__ import annotations

import torch

from lamella.calibrate.sample import LayerSample, Partition, RouterInit, choose, expert_norms
from lamella.conversion.partition.reconstruct import dense_output, reconstruct, relative_error
from lamella.conversion.partition.ridge import RidgeProblem
from lamella.conversion.partition.search import split_tokens

STRENGTHS = (1e-2, 1e-1, 1.0)
SMALLEST = 1e-6
"""Keeps the logarithm of an expert without output finite."""


def ridge_router(sample: LayerSample, partition: Partition, num_chosen: int, generator: torch.Generator) -> RouterInit:
    target_TE = (expert_norms(sample, partition) + SMALLEST).log()
    fit, heldout = split_tokens(sample)
    trial, reference_TD = RidgeProblem(fit.x_TD), dense_output(heldout)

    def error(strength: float) -> float:
        ids_TK = choose(trial.fit(target_TE[: len(fit.x_TD)], strength)(heldout.x_TD), num_chosen)
        return relative_error(reference_TD, reconstruct(heldout, partition, ids_TK))

    strength = min(STRENGTHS, key=error)
    return RouterInit(*RidgeProblem(sample.x_TD).fit(target_TE, strength))
