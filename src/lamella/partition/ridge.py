"""Ridge regression with an intercept: weight = (Xc' Xc + alpha I)^-1 Xc' Yc, of which one eigendecomposition serves
every alpha.

Shapes: T tokens, D inputs, E targets.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LinearMap(NamedTuple):
    weight_ED: Tensor
    bias_E: Tensor

    def __call__(self, x_TD: Tensor) -> Tensor:
        return x_TD @ self.weight_ED.T + self.bias_E


class RidgeProblem:
    """x -> y for any y: holds the eigendecomposition of x's covariance (float64)."""

    def __init__(self, x_TD: Tensor):
        x_TD = x_TD.double()
        self.mean_D = x_TD.mean(0)
        self.centred_TD = x_TD - self.mean_D
        self.values_D, self.vectors_DD = torch.linalg.eigh(self.centred_TD.T @ self.centred_TD)

    def fit(self, y_TE: Tensor, strength: float) -> LinearMap:
        """The map at alpha = strength times the mean variance of an input times T."""
        mean_E = y_TE.double().mean(0)
        moment_DE = self.vectors_DD.T @ (self.centred_TD.T @ (y_TE.double() - mean_E))
        alpha = strength * self.values_D.mean().clamp(min=1e-12)
        weight_ED = (self.vectors_DD @ (moment_DE / (self.values_D.clamp(min=0) + alpha)[:, None])).T
        return LinearMap(weight_ED.float(), (mean_E - weight_ED @ self.mean_D).float())
