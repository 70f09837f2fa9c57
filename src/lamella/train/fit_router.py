"""Router rows in closed form before the first step: old text to the frozen slices, new text to the twins.

Drawn rows must first learn to tell the texts apart, while the tokens of both already train the twins; and what all
hidden states have in common is most of what gradients show such a router. Ridge regression takes it out:

    w = argmin  mean over new tokens (w.x - 1)^2 + mean over old tokens (w.x + 1)^2 + ridge * tr(G)/D * |w|^2
      = (G + ridge * tr(G)/D * I)^-1 (mean of new x - mean of old x),   G = mean of new x x^T + mean of old x x^T

x: the layer's input in the dense model. All pairs get the same row, so their weights are equal, and a token whose
slices are chosen is computed as by the dense model.

Without `recall` a token is new where w.x > 0. With it, where w.x is above that quantile of the new tokens' which leaves
this share of them: old text that nobody could show to the router looks more like the new than what stood for it, and a
higher threshold keeps it from the twins.

Shapes: T tokens, D model width, S pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchtitan.tools.utils import device_type

from lamella.architecture.moe import MoEConfig
from lamella.data.packing import Sample
from lamella.moe.routing import expert_scores, pair_margins, router_logits
from lamella.recipe.sections import RouterFit
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.pipeline import through_stages
from lamella.train.balance import fill
from lamella.train.data import MixedSamples, collate


class Moments:
    """Over the tokens of one side, of what a layer gets: their number, sum, and sum of x x^T."""

    def __init__(self, D: int):
        self.count, self.sum_D, self.products_DD = (torch.zeros(s, device=device_type) for s in ((), (D,), (D, D)))

    def add(self, x_TD: Tensor) -> None:
        """Count these tokens in."""
        x_TD = x_TD.float()
        self.count += len(x_TD)
        self.sum_D += x_TD.sum(dim=0)
        self.products_DD.addmm_(x_TD.T, x_TD)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What adds up over ranks."""
        return self.count, self.sum_D, self.products_DD


class Logits:
    """How often the tokens of one side give a row each logit, in steps of 0.002 from -4 to 4 (the targets are -1 and
    1)."""

    EDGES = torch.linspace(-4, 4, 4001)

    def __init__(self, row_D: Tensor):
        self.row_D = row_D.to(device_type)
        self.counts = torch.zeros(len(self.EDGES) - 1, device=device_type)

    def add(self, x_TD: Tensor) -> None:
        """Count these tokens in."""
        logits_T = router_logits(x_TD, self.row_D[None]).flatten()
        low, high = self.EDGES[0].item(), self.EDGES[-1].item()
        self.counts += torch.histc(logits_T.clamp(low, high), len(self.counts), low, high)

    @property
    def sums(self) -> tuple[Tensor, ...]:
        """What adds up over ranks."""
        return (self.counts,)

    def above(self, share: float) -> float:
        """The logit that this share of the tokens exceeds."""
        below = self.counts.double().cumsum(0).cpu()
        place = int(torch.searchsorted(below, (1 - share) * below[-1]))
        return self.EDGES[min(place, len(self.EDGES) - 1)].item()


def sum_over(found: Sequence[Moments | Logits], meshes: Sequence[DeviceMesh]) -> None:
    """Add up what all ranks of these meshes have seen."""
    for mesh in meshes:
        for one in found:
            for tensor in one.sums:
                torch.distributed.all_reduce(tensor, group=mesh.get_group())


@torch.no_grad()
def fit_router(
    model: LamellaDecoder, fit: RouterFit, samples: MixedSamples, rank: int, size: int, per_batch: int,
    meshes: Sequence[DeviceMesh],
) -> None:  # fmt: skip
    """Replace the rows and the selection biases of all routers.

    Args:
        samples: of the recipe's data, which have the named sources.
        rank, size: this rank's place among those that compute other samples; `per_batch` samples in one forward.
        meshes: device meshes over which tokens differ.
    """
    model.eval()
    count = -(-fit.samples // (size * per_batch)) * size * per_batch  # every rank runs as many forwards

    def observe(names: Sequence[str], found: Sequence[Moments | Logits]) -> None:
        _observe(model, spread_over(samples, names, count)[rank::size], per_batch, found)
        sum_over(found, meshes)

    new, old = ([Moments(layer.router.weight.shape[1]) for layer in model.moe_layers] for _ in range(2))
    observe(fit.to_twins, new)
    observe(fit.to_slices, old)
    rows = [ridge_row(*moments, fit.ridge) for moments in zip(new, old, strict=True)]
    thresholds = [0.0] * len(rows)
    if fit.recall is not None:
        seen = [Logits(row_D) for row_D in rows]
        observe(fit.to_twins, seen)
        thresholds = [logits.above(fit.recall) for logits in seen]
    for layer, row_D, threshold in zip(model.moe_layers, rows, thresholds, strict=True):
        fill(layer.router.weight, row_D.expand(layer.router.weight.shape))
        fill(layer.router.selection_bias, bias_at(threshold, layer.moe))
    model.train()


def bias_at(logit: float, config: MoEConfig) -> Tensor:
    """The selection biases [S] with which a copy is chosen where the logit, that of all pairs, is above this one."""
    logits_1S = torch.full((1, config.num_frozen_experts), logit)
    return -pair_margins(expert_scores(logits_1S, config))[0] / 2


def _observe(
    model: LamellaDecoder, samples: Sequence[Sample], per_batch: int, found: Sequence[Moments | Logits]
) -> None:
    hooks = [
        layer.register_forward_pre_hook(partial(_add_input, one))
        for layer, one in zip(model.moe_layers, found, strict=True)
    ]
    for i in range(0, len(samples), per_batch):
        inputs, _ = collate(samples[i : i + per_batch])
        through_stages(model, {name: x.to(device_type) for name, x in inputs.items()}, mode="dense")
    for hook in hooks:
        hook.remove()


def _add_input(found: Moments | Logits, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Add what a layer gets: [B, L, D], under tensor parallelism this rank's part of it."""
    x_BLD = inputs[0].to_local() if isinstance(inputs[0], DTensor) else inputs[0]
    found.add(x_BLD.flatten(0, 1))


def ridge_row(new: Moments, old: Moments, ridge: float) -> Tensor:
    """The row [D] that tells the sides apart, float32, solved in float64."""
    G_DD = (new.products_DD / new.count + old.products_DD / old.count).double()
    G_DD.diagonal().add_(ridge * G_DD.diagonal().mean())
    return torch.linalg.solve(G_DD, (new.sum_D / new.count - old.sum_D / old.count).double()).float()


def spread_over(samples: MixedSamples, names: Sequence[str], count: int) -> list[Sample]:
    """`count` samples in all, as many of each of these sources, at even distances."""
    sources = [samples.names.index(name) for name in names]
    each = -(-count // len(sources))
    places = [(s, i * len(samples.sized[s]) // each) for i in range(each) for s in sources]
    return [samples.readable(source, position) for source, position in places[:count]]
