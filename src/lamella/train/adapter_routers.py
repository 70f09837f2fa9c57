"""Where untrained routers of adapters start: at the ridge regression of what they are given onto whose text it is.

Each text runs through its own adapter meanwhile, so a router is given what it will be given once all routers are right.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lamella.conversion.partition.ridge import RidgeProblem
from lamella.data.packing import PackedSamples
from lamella.hf.adapters import AdapterBlock, adapter_blocks

TOKENS_OF_EACH = 2048
"""Of each text."""
STRENGTH = 0.01
"""Of the ridge, in units of the mean variance of an input."""
MARGIN = 4.0
"""Nats, in the mean over tokens, by which the own adapter's logit is above the mean of the others."""


@torch.no_grad()
def start_routers(model: PreTrainedModel, texts: Sequence[PackedSamples], experts: Sequence[int]) -> None:
    """Set the rows of all routers.

    Args:
        experts: of each text, the number of its adapter.
    """
    blocks, computing = adapter_blocks(model), adapter_blocks(model)[0].computing
    seen: list[list[Tensor]] = [[] for _ in blocks]
    own_T: list[Tensor] = []
    for samples, expert in zip(texts, experts, strict=True):
        with computing.temporarily(replace(computing, adapter=expert)), _inputs(blocks, seen):
            for number in range(min(len(samples), max(1, TOKENS_OF_EACH // samples.seq_len))):
                ids_L = samples.sample(number).input_ids_L
                model.get_decoder()(ids_L[None].to(model.device), use_cache=False)
                own_T.append(torch.full((len(ids_L),), expert))
    for block, inputs in zip(blocks, seen, strict=True):
        block.router.weight.copy_(ridge_rows(torch.cat(inputs), torch.cat(own_T), block.config.num_experts))


def ridge_rows(x_TD: Tensor, own_T: Tensor, num_experts: int) -> Tensor:
    """Router rows [E, D], without an intercept: the regression is of x and -x onto y and -y, whose means are 0."""
    wanted_TE = F.one_hot(own_T, num_experts).float() - 1 / num_experts
    rows_ED = RidgeProblem(torch.cat([x_TD, -x_TD])).fit(torch.cat([wanted_TE, -wanted_TE]), STRENGTH).weight_ED
    logits_TE = x_TD @ rows_ED.T
    own_1 = logits_TE.gather(1, own_T[:, None]).mean()
    others_1 = (logits_TE.sum() / len(logits_TE) - own_1) / (num_experts - 1)
    return rows_ED * (MARGIN / (own_1 - others_1).clamp(min=1e-3))


@contextmanager
def _inputs(blocks: Sequence[AdapterBlock], seen: Sequence[list[Tensor]]) -> Iterator[None]:
    """Inside, what each router would be given is kept, in float32 on the CPU."""
    for block, inputs in zip(blocks, seen, strict=True):
        block.watch = lambda x_TD, inputs=inputs: inputs.append(x_TD.float().cpu())
    try:
        yield
    finally:
        for block in blocks:
            block.watch = None
