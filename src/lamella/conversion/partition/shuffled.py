"""Random neurons (LLaMA-MoE, arXiv 2406.16554, "independent random"): what every other partition has to beat.

The shared neurons are random too.
"""

from __future__ import annotations

import torch

from lamella.architecture.sizes import Parts, check_parts
from lamella.calibrate.sample import LayerSample, Partition


def shuffled(sample: LayerSample, parts: Parts, generator: torch.Generator) -> Partition:
    F = sample.ffn.up_FD.shape[0]
    f = check_parts(F, parts)
    ids_F = torch.randperm(F, generator=generator)
    count = parts.num_shared * f
    return Partition(ids_F[:count].sort().values, ids_F[count:].view(-1, f).sort(dim=1).values)
