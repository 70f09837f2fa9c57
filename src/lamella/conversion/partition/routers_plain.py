"""Routers that know nothing: all zero, or random (the LLaMA-MoE-v2 default, kaiming-uniform)."""

from __future__ import annotations

import torch

from lamella.calibrate.sample import LayerSample, Partition, RouterInit


def zero_router(sample: LayerSample, partition: Partition, num_chosen: int, generator: torch.Generator) -> RouterInit:
    E, D = len(partition.experts_Ef), sample.x_TD.shape[1]
    return RouterInit(torch.zeros(E, D), torch.zeros(E))


def random_router(sample: LayerSample, partition: Partition, num_chosen: int, generator: torch.Generator) -> RouterInit:
    """Uniform within 1/sqrt(D), as torch.nn.Linear starts."""
    E, D = len(partition.experts_Ef), sample.x_TD.shape[1]
    return RouterInit((torch.rand(E, D, generator=generator) * 2 - 1) * D**-0.5, torch.zeros(E))
