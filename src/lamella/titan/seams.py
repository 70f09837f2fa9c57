"""Private names of torchtitan, and of torch beneath it, that the training home touches, each with its reason.

tests/titan/test_seams.py fails, and says which and why, when a library changes one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch._dynamo.config
import torch._utils
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

# A parameter's own mesh (experts over fewer ranks than the rest) has no public spelling yet.
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

__all__ = [
    "GROUPED_PRODUCT", "HOOKS", "FSDPMeshInfo", "HSDPMeshInfo", "Hook", "ShardPlacementResult", "accelerator_answer",
    "allow_graphs", "computed_dtype", "keep_in_main_memory",
]  # fmt: skip


GROUPED_PRODUCT = torch.ops.aten._grouped_mm.default
"""The operator below `torch.nn.functional.grouped_mm`."""


class Hook(NamedTuple):
    """A private method of torchtitan that a class of ours replaces."""

    where: str
    """The class that defines it, module and name."""
    method: str
    parameters: tuple[str, ...]
    why: str


HOOKS = (
    Hook(
        "torchtitan.models.common.decoder.Decoder", "_create_flex_attention_mask",
        ("self", "positions", "attn_config", "mask_mods"), "adds the sliding window to the documents' mask",
    ),
    Hook(
        "torchtitan.models.common.rope.CosSinRoPE", "_precompute_cache", ("self",),
        "transformers' linear scaling, and Llama 3.1's to the last bit",
    ),
    Hook(
        "torchtitan.protocols.module.Module", "_init_self_buffers", ("self", "buffer_device"),
        "selection biases and statistics are buffers that begin on the meta device",
    ),
    Hook(
        "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageReader", "_process_read_request",
        ("self", "f", "req", "planner"), "packed experts are matrices here, and have three dimensions in the file",
    ),
    Hook(
        "torchtitan.components.optimizer.optimizer.OptimizersContainer", "_resolve_optimizer_factory", ("name",),
        "AdamW with bfloat16 moments is an optimizer, too",
    ),
    Hook(
        "torchtitan.components.checkpointer.dcp.CheckpointManager", "_save", ("self", "curr_step", "last_step"),
        "old checkpoints are removed behind the last one, too",
    ),
    Hook(
        "torchtitan.components.checkpointer.dcp.CheckpointManager", "_load", ("self", "step"),
        "takes the newest checkpoint whose every byte is as it was written",
    ),
    Hook(
        "torchtitan.components.checkpointer.dcp.CheckpointManager", "_find_load_step", ("self", "folder"),
        "`_load` has looked already",
    ),
    Hook(
        "torchtitan.components.checkpointer.dcp.CheckpointManager", "_purge_stale_checkpoints", ("self",),
        "the store knows which are committed, remote ones too",
    ),
)  # fmt: skip


@contextmanager
def accelerator_answer(kind: str, module: ModuleType) -> Iterator[None]:
    """Inside, torch answers `kind` to who asks which accelerator there is, and `module` for its functions.

    torchtitan asks these private functions once, when it is imported, and takes "cuda" where there is none.
    """
    asked: Any = torch._utils
    ask_type, ask_module = asked._get_available_device_type, asked._get_device_module
    asked._get_available_device_type = lambda: kind
    asked._get_device_module = lambda wanted: module if wanted == kind else ask_module(wanted)
    try:
        yield
    finally:
        asked._get_available_device_type, asked._get_device_module = ask_type, ask_module


def allow_graphs(number: int) -> None:
    """Let `torch.compile` make at least so many graphs of one function; the setting has no public spelling."""
    torch._dynamo.config.recompile_limit = max(number, torch._dynamo.config.recompile_limit)


def computed_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the activations of a model that FSDP has sharded: a stage of a pipeline must know it to receive.

    FSDP does not say its mixed precision policy in public.
    """
    policy = model._get_fsdp_state()._mp_policy  # type: ignore[operator]
    return policy.param_dtype or torch.float32


def keep_in_main_memory(module: FSDPModule, parameters: set[nn.Parameter], policy: CPUOffloadPolicy) -> None:
    """Have FSDP treat these parameters of a unit as the policy says: their parts wait in main memory and are copied to
    the device each time that the unit is gathered.

    In public a policy is that of a whole unit, and a smaller unit inside of a block, with hooks of its own, would cut
    the compiled block's graph in two.
    """
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for part in group.fsdp_params:
            if part.sharded_param in parameters:
                part.offload_to_cpu, part.pin_memory = True, policy.pin_memory
