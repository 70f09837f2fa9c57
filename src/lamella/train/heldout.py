"""The held-out loss: the training loss over a fixed set of samples, shared out among the ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.loss import BaseLoss
from torchtitan.distributed.utils import dist_sum
from torchtitan.tools.utils import device_type

from lamella.data.packing import IGNORE_INDEX, Sample
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.pipeline import through_stages
from lamella.train.data import blank, collate

Batch = tuple[dict[str, Tensor], Tensor]
"""See `lamella.train.data.collate`."""


class HeldOut:
    """Of each source rank r of W takes samples r, r + W, ...; every rank runs as many forwards (FSDP's are collective).

    `sources`: name -> samples; a batch is of one source. `mesh`: the ranks whose sums make up the loss; more than W
    where several share a sample. `stages`: a pipeline's.
    """

    def __init__(
        self,
        sources: dict[str, list[Sample]],
        rank: int,
        world_size: int,
        per_batch: int,
        mesh: DeviceMesh | None,
        stages: DeviceMesh | None = None,
    ):
        self.mesh, self.stages = mesh, stages
        self.batches = {name: _share(samples, rank, world_size, per_batch) for name, samples in sources.items()}

    @torch.no_grad()
    def loss(self, model: LamellaDecoder, loss_fn: BaseLoss) -> tuple[float, dict[str, float]]:
        """(the mean loss in nats per token with a label, that of each source with labels), the same on every rank."""
        model.eval()
        sums = {name: self._sum(model, loss_fn, batches) for name, batches in self.batches.items()}
        model.train()
        return (
            sum(total for total, _ in sums.values()) / sum(count for _, count in sums.values()),
            {name: total / count for name, (total, count) in sums.items() if count},
        )

    def _sum(self, model: LamellaDecoder, loss_fn: BaseLoss, batches: list[Batch]) -> tuple[float, float]:
        """(the sum of the losses, how many tokens have a label) over all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=device_type)
        count = torch.zeros((), dtype=torch.float64, device=device_type)
        for inputs, labels in batches:
            labels = labels.to(device_type)
            logits = through_stages(model, {name: x.to(device_type) for name, x in inputs.items()}, self.stages)
            if logits is None:
                continue
            if model.context is not None:
                labels = model.context.part(labels)
            total += loss_fn(logits, labels)[0].double()
            count += (labels != IGNORE_INDEX).sum()
        sums = [dist_sum(x, self.mesh) for x in (total, count)]
        if self.stages is not None:  # of which the last one counted
            sums = [dist_sum(torch.tensor(x, dtype=torch.float64, device=device_type), self.stages) for x in sums]
        return sums[0], sums[1]


def _share(samples: list[Sample], rank: int, world_size: int, per_batch: int) -> list[Batch]:
    """One rank's batches of a source, as many as every other rank's."""
    rounds = -(-len(samples) // (world_size * per_batch))
    mine = samples[rank::world_size]
    mine += [blank(samples[0])] * (rounds * per_batch - len(mine))
    return [collate(mine[i : i + per_batch]) for i in range(0, len(mine), per_batch)]
