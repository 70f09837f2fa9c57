"""What trains, and which rank computes what: tokens, heads and experts; `lamella.titan.shard` shares out weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.config import TORCH_DTYPE_MAP, CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing

from lamella.architecture.names import is_trained, stays_in_model
from lamella.titan.compile import compile_blocks
from lamella.titan.context import ContextShare
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.inner_attention import share_keys
from lamella.titan.shard import shard_decoder
from lamella.titan.tensor import replicate


def parallelize(
    model: LamellaDecoder,
    *,
    parallel_dims: ParallelDims,
    training: TrainingConfig,
    parallelism: ParallelismConfig,
    compile_config: CompileConfig | None,
    ac_config: ActivationCheckpointing.Config | None,
    dump_folder: str,
) -> nn.Module:
    """torchtitan's `parallelize_fn`: freeze, share out experts, activation checkpointing, compile, FSDP2 over all
    ranks."""
    # FSDP keeps each parameter's requires_grad as it finds it
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, model.config.trains))
    replicated = model.config.frozen_weights == "replicated"
    computed_in = TORCH_DTYPE_MAP[training.mixed_precision_param]
    _hold_frozen(model, computed_in if replicated else frozen_dtype(model.config.file_dtype, computed_in))
    if parallel_dims.cp_enabled:
        _share_out_tokens(model, parallel_dims.get_mesh("cp"))
    if parallel_dims.tp_enabled:
        _share_out_heads(model, parallel_dims)
    if parallel_dims.ep_enabled:
        _share_out_experts(model, parallel_dims.get_mesh("ep"))
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    if compile_config is not None and compile_config.enable and "model" in compile_config.components:
        num_tokens = training.local_batch_size * training.seq_len // parallel_dims.cp
        compile_blocks(model, compile_config, parallel_dims, num_tokens, computed_in)
    whole = {p for p in model.parameters() if replicated and not p.requires_grad}
    shard_decoder(model, parallel_dims, training, parallelism, whole)
    if not torch.accelerator.is_available():
        _sum_reductions(model)
    return model


def frozen_dtype(file_dtype: str, computed_in: torch.dtype) -> torch.dtype:
    """The dtype in which weights that do not train are held: the file's where it is a half precision, else that of the
    computation. FSDP casts what it gathers to the latter, so the results are those of float32 copies."""
    held = getattr(torch, file_dtype)
    return held if held.itemsize < torch.float32.itemsize else computed_in


def _hold_frozen(model: LamellaDecoder, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        if stays_in_model(name, model.config.trains):
            parameter.data = parameter.data.to(dtype)


def _share_out_tokens(model: LamellaDecoder, mesh: DeviceMesh) -> None:
    """Each rank of the mesh computes its part of every sample (context parallelism)."""
    model.context = ContextShare(mesh.get_local_rank(), mesh.size())
    for layer in model.layers.values():
        share_keys(layer.attention.inner_attention, mesh.get_group())


def _share_out_heads(model: LamellaDecoder, parallel_dims: ParallelDims) -> None:
    """Ranks share out heads, FFN neurons and vocabulary (tensor parallelism); MoE layers get tokens of their own."""
    model.parallelize(parallel_dims)
    if model.enable_weight_tying:  # it made parameters of both anew
        model.tok_embeddings.weight = model.lm_head.weight
    mesh = parallel_dims.get_mesh("tp")
    for layer in model.moe_layers:
        for module in (layer, layer.router, layer.shared):
            if module is not None:
                replicate(module, mesh)


def _share_out_experts(model: LamellaDecoder, mesh: DeviceMesh) -> None:
    """Rank r of the mesh keeps the r-th part of each packed tensor: of the slices, and of their twins."""
    for layer in model.moe_layers:
        layer.expert_group = mesh.get_group()
        for name, parameter in list(layer.experts.named_parameters()):
            part = nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]), parameter.requires_grad)
            layer.experts.register_parameter(name, part)


def _sum_reductions(model: nn.Module) -> None:
    """gloo has no PREMUL_SUM, which FSDP asks for with a divide factor of 1.0; failing poisons the group."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
