"""Evaluation through the stages of a pipeline, one batch at a time; training has torchtitan's schedules."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lamella.architecture.moe import Mode
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.seams import computed_dtype


def through_stages(
    model: LamellaDecoder, inputs: dict[str, Tensor], stages: DeviceMesh | None = None, mode: Mode = "routed"
) -> Tensor | None:
    """The logits [B, L, vocabulary]; None on every stage but the last.

    Args:
        model: the whole, or this rank's stage.
        inputs: "input" [B, L] and "positions" [B, L].
        stages: device mesh of a pipeline, or None.
    """
    tokens, positions = inputs["input"], inputs["positions"]
    if stages is None:
        return model(tokens, positions, mode=mode)
    rank, group = stages.get_local_rank(), stages.get_group()
    x = tokens
    if rank > 0:
        B, L = tokens.shape if model.context is None else model.context.part(tokens).shape
        x = torch.empty(B, L, model.config.dim, dtype=computed_dtype(model), device=tokens.device)
        dist.recv(x, group=group, group_src=rank - 1)
    y = model(x, positions, mode=mode)
    if rank == stages.size() - 1:
        return y
    dist.send(y.contiguous(), group=group, group_dst=rank + 1)
    return None
