"""Down projection refitted to what the routing leaves on: kept neurons take over what they can predict of dropped ones.

Ridge regression of what is missing, y_dense - y_moe, onto the masked activations m*h (FLAP's bias, arXiv 2312.11983,
with slopes beside the intercept):

    down' = down + dW,   dW = argmin sum_t w_t |(y_t - y_moe,t) - dW (m*h)_t - b|^2 + alpha |dW|^2

w_t makes errors relative to a token's own output (`token_weights`). alpha pulls towards the dense weights, and is the
one that leaves least on held-out tokens. It is a trade: with all experts on, the layer is no longer the dense one
exactly.

Shapes: T tokens, D width, F neurons, E experts, K chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamella.calibrate.sample import LayerSample
from lamella.conversion.partition.reconstruct import dense_output, token_weights
from lamella.conversion.partition.ridge import RidgeProblem
from lamella.conversion.partition.search import HELDOUT_SHARE

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class Refit(NamedTuple):
    down_DF: Tensor
    bias_D: Tensor
    """It is added to the output, beside the dense output bias."""


def refit_down(sample: LayerSample, masked_TF: Tensor, reference_TD: Tensor | None = None) -> Refit:
    """The down projection and output bias that bring `masked_TF` nearest to the reference.

    Args:
        masked_TF: h times how often the routing (or the pruning) computes each neuron.
        reference_TD: the output to reach; None: the dense one.
    """
    ffn = sample.ffn
    target_TD = dense_output(sample) if reference_TD is None else reference_TD
    missing_TD = target_TD - torch.nn.functional.linear(masked_TF, ffn.down_DF, ffn.down_bias_D)
    weight_T = token_weights(target_TD)
    strength = _best_strength(masked_TF, missing_TD, weight_T)
    change = RidgeProblem(masked_TF, weight_T).fit(missing_TD, strength)
    return Refit(ffn.down_DF + change.weight_ED, change.bias_E)


def _best_strength(masked_TF: Tensor, missing_TD: Tensor, weight_T: Tensor) -> float:
    """That which leaves least on held-out tokens. Apart, so that its [F, F] products are gone before the next."""
    fit = round(len(masked_TF) * (1 - HELDOUT_SHARE))
    trial = RidgeProblem(masked_TF[:fit], weight_T[:fit])
    moments = trial.moments(missing_TD[:fit])

    def error(strength: float) -> float:
        found = trial.solve(moments, strength)(masked_TF[fit:])
        return ((missing_TD[fit:] - found).square().sum(1) * weight_T[fit:]).sum().item()

    return min(STRENGTHS, key=error)
