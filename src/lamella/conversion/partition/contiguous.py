"""Neurons in their order (LLaMA-MoE, arXiv 2406.16554, "independent"; Dynamic MoE): part i is rows [i f, (i+1) f).

Knows nothing of importance, so the shared parts are simply the first ones, which keeps every part contiguous.
"""

from __future__ import annotations

import torch

from lamella.architecture.sizes import Parts, check_parts
from lamella.calibrate.sample import LayerSample, Partition


def contiguous(sample: LayerSample, parts: Parts, generator: torch.Generator) -> Partition:
    F = sample.ffn.up_FD.shape[0]
    f = check_parts(F, parts)
    ids_Gf = torch.arange(F).view(-1, f)
    return Partition(ids_Gf[: parts.num_shared].flatten(), ids_Gf[parts.num_shared :])
