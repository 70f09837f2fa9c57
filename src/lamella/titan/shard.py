"""FSDP2 over a decoder: what is gathered together, and over which ranks it is cut.

The units are torchtitan's: the embedding, every block, and the last norm with the head; a tied embedding belongs to the
head. All parameters are cut by rows. Frozen experts, which have neither gradients nor an optimizer, can wait in main
memory: a block's are copied when the block is gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard
from torchtitan.config import TORCH_DTYPE_MAP, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger

from lamella.architecture.moe_tensors import is_frozen
from lamella.titan.block import Block
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.seams import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult, keep_in_main_memory

Placement: TypeAlias = Callable[[nn.Parameter], ShardPlacementResult]


@dataclass(frozen=True)
class Sharding:
    """How one model is laid over the ranks of data parallelism."""

    mesh: DeviceMesh
    """The ranks that hold parts of all but the experts, in the last dimension; before it, copies (HSDP)."""
    expert_mesh: DeviceMesh
    """The same for the experts; with expert parallelism fewer ranks, as these hold different experts."""
    precision: MixedPrecisionPolicy
    offload: OffloadPolicy
    ignored: set[nn.Parameter]
    """Parameters that every rank holds whole."""

    def fully_shard(
        self, modules: list[nn.Module], reshard_after_forward: bool | None = None, placement: Placement | None = None
    ) -> None:
        """Make the modules one unit of FSDP."""
        if modules:
            fully_shard(
                modules if len(modules) > 1 else modules[0],  # type: ignore[arg-type]  # either, by two overloads
                mesh=self.mesh, mp_policy=self.precision, offload_policy=self.offload, ignored_params=self.ignored,
                reshard_after_forward=reshard_after_forward, shard_placement_fn=placement,
            )  # fmt: skip

    def placement(self, block: Block) -> Placement | None:
        """Over which ranks each parameter of a block is cut; None: all alike."""
        if not block.moe_enabled or self.expert_mesh is self.mesh:
            return None
        experts = set(block.moe.experts.parameters())
        rest, own = _mesh_info(self.mesh), _mesh_info(self.expert_mesh)
        return lambda p: ShardPlacementResult(Shard(0), own if p in experts else rest)


def shard_decoder(
    model: LamellaDecoder,
    dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    ignored: set[nn.Parameter],
) -> None:
    """Lay the model over the ranks of data parallelism; parameters in `ignored` stay whole."""
    sharding = _sharding(dims, training, ignored)
    policy = parallelism.fsdp_reshard_after_forward
    # a pipeline runs many micro-batches through a layer: gathering it for each would cost more than its memory
    reshard = policy == "always" or (policy == "default" and not dims.pp_enabled)
    # a stage of a pipeline may lack them
    embedding = [] if model.tok_embeddings is None else [model.tok_embeddings]
    last = [] if model.norm is None or model.lm_head is None else [model.norm, model.lm_head]
    if model.enable_weight_tying:
        last = embedding + last
    else:
        sharding.fully_shard(embedding, reshard)
    sharding.fully_shard(last, policy == "always")  # the backward pass needs it again at once
    blocks = list(model.layers.values())
    for block in blocks:
        sharding.fully_shard([block], reshard, sharding.placement(block))
    if model.config.offloads_frozen:
        _offload_frozen(blocks)
    sharding.fully_shard([model])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the tokens of all ranks
    if dims.ep_enabled:
        _prefetch(embedding, blocks, last)


def sum_gradients(model: nn.Module, once_per_step: bool, is_last: bool) -> None:
    """Say which sums over ranks the backward pass of a micro-batch takes.

    Args:
        once_per_step: gradients stay whole on each rank until the last micro-batch.
        is_last: whether this micro-batch is the last of its optimizer step.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or not once_per_step)
        model.set_requires_all_reduce(is_last)  # over copies; within one, sums of parts are kept meanwhile


def _sharding(dims: ParallelDims, training: TrainingConfig, ignored: set[nn.Parameter]) -> Sharding:
    copies = ["dp_replicate"] if dims.dp_replicate_enabled else []
    mesh = dims.get_mesh([*copies, "fsdp"])
    expert_mesh = dims.get_mesh([*copies, "efsdp"]) if dims.ep_enabled else mesh
    precision = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy()
    return Sharding(mesh, expert_mesh, precision, offload, ignored)


def _offload_frozen(blocks: list[Block]) -> None:
    # pages are locked for the sake of a GPU's copies, and cannot be without one
    offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    for block in blocks:
        assert isinstance(block, FSDPModule)
        keep_in_main_memory(block, {p for name, p in block.named_parameters() if is_frozen(name)}, offload)
    logger.info("The frozen experts wait in main memory")


def _mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)


def _prefetch(embedding: list[nn.Module], blocks: list[nn.Module], last: list[nn.Module]) -> None:
    """Gather each unit while the one before it computes: exchanging tokens may hide the order from FSDP."""
    forward = [*([m] for m in embedding), *([b] for b in blocks), last]
    backward = [[last[-1]] if last else [], *([b] for b in reversed(blocks)), embedding]
    for order, name in ((forward, "forward"), (backward, "backward")):
        units = [unit for unit in order if unit]
        for unit, following in pairwise(units):
            module = unit[0]
            assert isinstance(module, FSDPModule)
            targets: list[FSDPModule] = [m for m in following if isinstance(m, FSDPModule)]
            if name == "forward":
                module.set_modules_to_forward_prefetch(targets)
            else:
                module.set_modules_to_backward_prefetch(targets)
