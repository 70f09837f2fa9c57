"""FSDP2 over a decoder: what is gathered together, over which ranks, and cut along which dimension.

The units are torchtitan's: the embedding, every block, and the last norm with the head; a tied embedding belongs to the
head. Packed experts are cut by expert while there are at most as many ranks as experts, along their rows beyond that.
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

from lamella.titan.block import Block
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.seams import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult

Placement: TypeAlias = Callable[[nn.Parameter], Shard | ShardPlacementResult | None]


@dataclass(frozen=True)
class Sharding:
    """How one model is laid over the ranks of data parallelism."""

    mesh: DeviceMesh
    """The ranks that hold parts of all but the experts, in the last dimension; before it, copies (HSDP)."""
    expert_mesh: DeviceMesh
    """The same for the experts; with expert parallelism fewer ranks, as these hold different experts."""
    ranks_of_experts: int
    """Ranks over which the experts of one layer are cut, expert parallelism included."""
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
        """Which dimension of each parameter of a block is cut, and over which ranks; None: all alike."""
        if not block.moe_enabled:
            return None
        experts = set(block.moe.experts.parameters())
        dimension = expert_dimension([p.shape for p in experts], self.ranks_of_experts, self.expert_mesh.shape[-1])
        if self.expert_mesh is self.mesh:
            return None if dimension == 0 else lambda p: Shard(dimension) if p in experts else None
        rest, own = _mesh_info(self.mesh), _mesh_info(self.expert_mesh)
        return lambda p: ShardPlacementResult(*((Shard(dimension), own) if p in experts else (Shard(0), rest)))


def expert_dimension(shapes: list[torch.Size], num_ranks: int, num_parts: int) -> int:
    """The dimension along which packed experts are cut.

    Dimension 0 is the experts'. With more ranks than experts it would leave some without any, so dimension 1 is cut,
    which must divide evenly; where it does not, dimension 0 is padded.

    Args:
        shapes: of all packed tensors of a layer, [experts, rows, columns], before they are cut.
        num_ranks: those that share the layer's experts, expert parallelism included.
        num_parts: parts that each tensor is cut into.
    """
    if not shapes or num_ranks <= min(shape[0] for shape in shapes):
        return 0
    uneven = [shape[1] for shape in shapes if shape[1] % num_parts]
    if uneven:
        logger.warning(f"{num_parts} ranks divide none of {uneven}: expert shards are padded, some ranks hold none")
    return 0 if uneven else 1


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
    sharding.fully_shard([model])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # losses are divided by the tokens of all ranks
    if dims.ep_enabled:
        _prefetch(embedding, blocks, last)


def _sharding(dims: ParallelDims, training: TrainingConfig, ignored: set[nn.Parameter]) -> Sharding:
    copies = ["dp_replicate"] if dims.dp_replicate_enabled else []
    mesh = dims.get_mesh([*copies, "fsdp"])
    expert_mesh = dims.get_mesh([*copies, "efsdp"]) if dims.ep_enabled else mesh
    # torchtitan counts copies without expert parallelism, and does not with it
    ranks = expert_mesh["efsdp"].size() * dims.ep if dims.ep_enabled else mesh.size()
    precision = MixedPrecisionPolicy(
        param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
        reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if training.enable_cpu_offload else OffloadPolicy()
    return Sharding(mesh, expert_mesh, ranks, precision, offload, ignored)


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
