"""Ridge regression with an intercept: weight = (Xc' Xc + alpha I)^-1 Xc' Yc, by Cholesky decomposition. Tokens may have
weights: then both products and both means are weighted sums.

Products over tokens are float32, a few thousand tokens at a time, and add up in float64; the systems are float64.

Shapes: T tokens, D inputs, E targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOKENS_AT_ONCE = 4096


class LinearMap(NamedTuple):
    weight_ED: Tensor
    bias_E: Tensor

    def __call__(self, x_TD: Tensor) -> Tensor:
        return x_TD @ self.weight_ED.T + self.bias_E


class Moments(NamedTuple):
    """All that a fit asks of the targets; float64."""

    cross_DE: Tensor
    mean_E: Tensor


class RidgeProblem:
    """x -> y for any y: holds x's covariance times T (float64)."""

    def __init__(self, x_TD: Tensor, weight_T: Tensor | None = None):
        self.weight_T1 = None if weight_T is None else weight_T[:, None] / weight_T.mean()
        self.mean_D = self._mean(x_TD)
        self.centred_TD = x_TD - self.mean_D.float()
        self.gram_DD = self._product(self.centred_TD)

    def moments(self, y_TE: Tensor) -> Moments:
        mean_E = self._mean(y_TE)
        return Moments(self._product(y_TE - mean_E.float()), mean_E)

    def _mean(self, of_TE: Tensor) -> Tensor:
        weight_T1 = torch.ones(len(of_TE), 1) if self.weight_T1 is None else self.weight_T1
        return _product(weight_T1, of_TE)[0] / len(of_TE)

    def _product(self, with_TE: Tensor) -> Tensor:
        weighted_TE = with_TE if self.weight_T1 is None else with_TE * self.weight_T1
        return _product(self.centred_TD, weighted_TE)

    def solve(self, moments: Moments, strength: float) -> LinearMap:
        """The map at alpha = strength times the mean variance of an input times T."""
        alpha = strength * self.gram_DD.diagonal().mean().clamp(min=1e-12)
        system_DD = self.gram_DD.clone()
        system_DD.diagonal().add_(alpha)
        factor_DD = torch.linalg.cholesky(system_DD)
        weight_ED = torch.cholesky_solve(moments.cross_DE, factor_DD).T
        return LinearMap(weight_ED.float(), (moments.mean_E - weight_ED @ self.mean_D).float())

    def fit(self, y_TE: Tensor, strength: float) -> LinearMap:
        return self.solve(self.moments(y_TE), strength)


def _product(a_TD: Tensor, b_TE: Tensor) -> Tensor:
    """a' b, float64."""
    total_DE = torch.zeros(a_TD.shape[1], b_TE.shape[1], dtype=torch.float64)
    for a, b in zip(a_TD.split(TOKENS_AT_ONCE), b_TE.split(TOKENS_AT_ONCE), strict=True):
        total_DE += a.T @ b
    return total_DE
