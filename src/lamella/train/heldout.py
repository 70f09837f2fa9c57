"""The held-out loss: the training loss over a fixed set of samples, shared out among the ranks."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torchtitan.components.loss import BaseLoss
from torchtitan.distributed.utils import dist_sum
from torchtitan.tools.utils import device_type

from lamella.data.packing import IGNORE_INDEX, Sample
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.pipeline import through_stages
from lamella.train.data import blank, collate


class HeldOut:
    """Rank r of W takes samples r, r + W, ...; every rank runs as many forwards (FSDP's are collective).

    `mesh`: the ranks whose sums make up the loss; more than W where several share a sample. `stages`: a pipeline's.
    """

    def __init__(
        self,
        samples: list[Sample],
        rank: int,
        world_size: int,
        per_batch: int,
        mesh: DeviceMesh | None,
        stages: DeviceMesh | None = None,
    ):
        self.mesh, self.stages = mesh, stages
        rounds = -(-len(samples) // (world_size * per_batch))
        mine = samples[rank::world_size]
        mine += [blank(samples[0])] * (rounds * per_batch - len(mine))
        self.batches = [collate(mine[i : i + per_batch]) for i in range(0, len(mine), per_batch)]

    @torch.no_grad()
    def loss(self, model: LamellaDecoder, loss_fn: BaseLoss) -> float:
        """The mean loss in nats per token with a label, the same number on every rank."""
        model.eval()
        total = torch.zeros((), dtype=torch.float64, device=device_type)
        count = torch.zeros((), dtype=torch.float64, device=device_type)
        for inputs, labels in self.batches:
            labels = labels.to(device_type)
            logits = through_stages(model, {name: x.to(device_type) for name, x in inputs.items()}, self.stages)
            if logits is None:
                continue
            if model.context is not None:
                labels = model.context.part(labels)
            total += loss_fn(logits, labels)[0].double()
            count += (labels != IGNORE_INDEX).sum()
        model.train()
        totals = [dist_sum(x, self.mesh) for x in (total, count)]
        if self.stages is not None:  # of which the last one counted
            totals = [dist_sum(torch.tensor(x, dtype=torch.float64, device=device_type), self.stages) for x in totals]
        return totals[0] / totals[1]
