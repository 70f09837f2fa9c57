"""Blocks compiled one by one with `torch.compile`.

A block is one graph (`fullgraph=True`): routing, its statistics and the experts are in it, FSDP's hooks around it. What
the host must look at in a block would break the graph, so expert paths that ask the device for numbers of rows are not
compiled.
"""

from __future__ import annotations

import torch
from torchtitan.config import CompileConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.compile import apply_compile
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import device_type

from lamella.architecture.moe import ExpertPath
from lamella.moe.paths.ahead import path_ahead
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.moe import MoELayer
from lamella.titan.seams import allow_graphs

COMPILED_PATHS: tuple[ExpertPath, ...] = ("grouped", "fused")
"""They wait for no host, and their shapes follow from those of their inputs."""
GRAPHS = 64
"""Layers of one kind share their graphs, one for each of training, held-out loss and teaching, and what differs between
kinds of layers; torch takes more than 8 for a mistake."""


def compile_blocks(
    model: LamellaDecoder, config: CompileConfig, dims: ParallelDims, num_tokens: int, dtype: torch.dtype
) -> None:
    """Compile every block, before FSDP cuts its weights; the fastest expert path is measured before.

    Args:
        num_tokens: of one rank's forward.
        dtype: of the computation.
    """
    for layer in model.moe_layers:
        if layer.path == "auto":
            layer.path = _path(layer, num_tokens, dtype)
    unfit = {layer.path for layer in model.moe_layers} - set(COMPILED_PATHS)
    if unfit:
        logger.warning(f"Blocks are not compiled: widths are for the expert path {', '.join(unfit)}, which waits")
        return
    torch.compiler.reset()  # graphs of an earlier stage of this process
    allow_graphs(GRAPHS)
    apply_compile(model, compile_config=config, parallel_dims=dims)  # type: ignore[arg-type]


def _path(layer: MoELayer, num_tokens: int, dtype: torch.dtype) -> ExpertPath:
    moe, D = layer.moe, layer.router.weight.shape[1]
    if moe.lora_rank:  # rows of 16 bytes, as `lamella.moe.lora` wants them of grouped products
        return "grouped" if all(n % 8 == 0 for n in (D, moe.moe_intermediate_size, moe.lora_rank)) else "loop"
    ranks = 1 if layer.expert_group is None else layer.expert_group.size()
    return path_ahead(
        num_tokens * ranks, D, moe.moe_intermediate_size, moe.num_frozen_experts // ranks,
        moe.num_trainable_experts // ranks, moe.num_experts_per_tok // ranks, dtype, torch.device(device_type),
        COMPILED_PATHS,
    )  # fmt: skip
