"""Router rows in closed form before the first step: old text to the frozen slices, new text to the twins.

Drawn rows must first learn to tell the texts apart, while the tokens of both already train the twins; and what all
hidden states have in common is most of what gradients show such a router. Ridge regression takes it out:

    w = argmin  mean over new tokens (w.x - 1)^2 + mean over old tokens (w.x + 1)^2 + ridge * tr(G)/D * |w|^2
      = (G + ridge * tr(G)/D * I)^-1 (mean of new x - mean of old x),   G = mean of new x x^T + mean of old x x^T

x: the layer's input in the dense model. All pairs get the same row, so their weights are equal, and a token whose
slices are chosen is computed as by the dense model.

Without `recall` a token is new where w.x > 0. With it, the threshold is the one that this share of the new tokens is
above: old text that nobody could show to the router looks more like the new than what stood for it, and a higher
threshold keeps it from the twins.

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
from lamella.moe.balancing import share_bias
from lamella.moe.collectives import gather_rows
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

    def sum_over(self, meshes: Sequence[DeviceMesh]) -> None:
        """Add up the moments of all ranks of these meshes."""
        for mesh in meshes:
            for tensor in (self.count, self.sum_D, self.products_DD):
                torch.distributed.all_reduce(tensor, group=mesh.get_group())


class Margins:
    """By how much the tokens of one side prefer the copies, the same in all pairs, under the fitted row."""

    def __init__(self, row_D: Tensor, config: MoEConfig):
        self.row_RD, self.config = row_D.to(device_type).expand(config.num_frozen_experts, -1), config
        self.parts: list[Tensor] = []

    def add(self, x_TD: Tensor) -> None:
        """Count these tokens in."""
        margins_TS = pair_margins(expert_scores(router_logits(x_TD, self.row_RD), self.config))
        self.parts.append(margins_TS[:, :1].clone())

    def bias(self, recall: float, meshes: Sequence[DeviceMesh]) -> Tensor:
        """The selection bias [1] with which this share of the tokens goes to the copies; those of all ranks of these
        meshes, on each of which there are as many."""
        margins_T1 = torch.cat(self.parts)
        for mesh in meshes:
            margins_T1 = gather_rows(margins_T1, mesh.get_group())
        return share_bias(margins_T1, recall)


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

    def observe(names: Sequence[str], observers: Sequence[Moments | Margins]) -> None:
        _observe(model, spread_over(samples, names, count)[rank::size], per_batch, observers)

    new, old = ([Moments(layer.router.weight.shape[1]) for layer in model.moe_layers] for _ in range(2))
    observe(fit.to_twins, new)
    observe(fit.to_slices, old)
    rows = []
    for layer, new_moments, old_moments in zip(model.moe_layers, new, old, strict=True):
        new_moments.sum_over(meshes)
        old_moments.sum_over(meshes)
        rows.append(ridge_row(new_moments, old_moments, fit.ridge))
        fill(layer.router.weight, rows[-1].expand(layer.router.weight.shape))
        layer.router.selection_bias.zero_()
    if fit.recall is not None:
        margins = [Margins(row_D, layer.moe) for row_D, layer in zip(rows, model.moe_layers, strict=True)]
        observe(fit.to_twins, margins)
        for layer, its_margins in zip(model.moe_layers, margins, strict=True):
            bias = layer.router.selection_bias
            fill(bias, its_margins.bias(fit.recall, meshes).expand(bias.shape))
    model.train()


def _observe(
    model: LamellaDecoder, samples: Sequence[Sample], per_batch: int, observers: Sequence[Moments | Margins]
) -> None:
    hooks = [
        layer.register_forward_pre_hook(partial(_add_input, observer))
        for layer, observer in zip(model.moe_layers, observers, strict=True)
    ]
    for i in range(0, len(samples), per_batch):
        inputs, _ = collate(samples[i : i + per_batch])
        through_stages(model, {name: x.to(device_type) for name, x in inputs.items()}, mode="dense")
    for hook in hooks:
        hook.remove()


def _add_input(observer: Moments | Margins, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Add what a layer gets: [B, L, D], under tensor parallelism this rank's part of it."""
    x_BLD = inputs[0].to_local() if isinstance(inputs[0], DTensor) else inputs[0]
    observer.add(x_BLD.flatten(0, 1))


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
