"""What trains, and how the model is laid over the ranks: FSDP2, copies of it (HSDP), and who shares
experts and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard, distribute_tensor
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.tools.logging import logger

from lamella.architecture.names import is_trained
from lamella.titan.context import ContextShare, with_all_keys
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.tensor import on_own_tokens, replicate


def parallelize(
    model: LamellaDecoder,
    *,
    parallel_dims: Any,
    training: Any,
    parallelism: Any,
    compile_config: Any,
    ac_config: Any,
    dump_folder: str,
) -> nn.Module:
    """torchtitan's `parallelize_fn`: freeze, share out experts, activation checkpointing, FSDP2 over all ranks."""
    # FSDP keeps each parameter's requires_grad as it finds it
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, model.config.trains))
    param_dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    replicated = model.config.frozen_weights == "replicated"
    if replicated:
        _cast_frozen(model, param_dtype)
    if parallel_dims.cp_enabled:
        _share_out_tokens(model, parallel_dims.get_mesh("cp"))
    if parallel_dims.tp_enabled:
        _share_out_heads(model, parallel_dims)
    if parallel_dims.ep_enabled:
        _share_out_experts(model, parallel_dims.get_mesh("ep"))
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    copies = ["dp_replicate"] if parallel_dims.dp_replicate_enabled else []
    expert_mesh = parallel_dims.get_mesh([*copies, "efsdp"]) if parallel_dims.ep_enabled else None
    _keep_shards_even(model, parallel_dims)
    whole = {p for p in model.parameters() if replicated and not p.requires_grad}
    with _set_aside(model, whole):
        apply_fsdp_to_decoder(
            model,
            parallel_dims.get_mesh([*copies, "fsdp"]),
            param_dtype=param_dtype,
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            pp_enabled=parallel_dims.pp_enabled,
            cpu_offload=training.enable_cpu_offload,
            reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
            ep_degree=parallel_dims.ep,
            edp_mesh=expert_mesh,
        )
    if not torch.accelerator.is_available():
        _sum_reductions(model)
    return model


def _cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """What does not train is held in the dtype of the computation, as FSDP casts what it gathers."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _share_out_tokens(model: LamellaDecoder, mesh: Any) -> None:
    model.context = ContextShare(mesh.get_local_rank(), mesh.size())
    for layer in model.layers.values():
        inner: Any = layer.attention.inner_attention
        inner.forward = with_all_keys(inner.forward, mesh.get_group())


def _share_out_heads(model: LamellaDecoder, parallel_dims: Any) -> None:
    """And FFN neurons and vocabulary; the MoE layers get tokens of their own."""
    model.parallelize(parallel_dims)
    if model.enable_weight_tying:  # it made parameters of both anew
        model.tok_embeddings.weight = model.lm_head.weight
    mesh = parallel_dims.get_mesh("tp")
    for layer in model.moe_layers:
        for module in (layer, layer.router, layer.shared):
            if module is not None:
                replicate(module, mesh)
        moe: Any = layer
        moe.forward = on_own_tokens(layer.forward, mesh)


def _share_out_experts(model: LamellaDecoder, mesh: Any) -> None:
    """Rank r of the mesh keeps the r-th part of each packed tensor: of the slices, and of their twins."""
    for layer in model.moe_layers:
        layer.expert_group = mesh.get_group()
        for name, parameter in list(layer.experts.named_parameters()):
            part = nn.Parameter(distribute_tensor(parameter.data, mesh, [Shard(0)]), parameter.requires_grad)
            layer.experts.register_parameter(name, part)


@contextmanager
def _set_aside(model: nn.Module, parameters: set[nn.Parameter]) -> Iterator[None]:
    """Inside, the model is without these parameters: FSDP leaves them as they are."""
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in parameters
    ]
    for module, name, _ in places:
        delattr(module, name)
    yield
    for module, name, parameter in places:
        module.register_parameter(name, parameter)


def _keep_shards_even(model: LamellaDecoder, parallel_dims: Any) -> None:
    """Over more ranks than experts, torchtitan shards dimension 1, which must divide evenly; else pad dimension 0."""
    num_ranks = parallel_dims.dp_shard * parallel_dims.cp
    if parallel_dims.ep > 1:
        num_ranks = num_ranks * parallel_dims.tp // parallel_dims.ep
    compared = num_ranks * (parallel_dims.ep if parallel_dims.ep > 1 else parallel_dims.dp_replicate)
    for layer in model.moe_layers:
        experts = layer.experts
        uneven = [p.shape[1] for p in experts.parameters() if p.shape[1] % num_ranks]
        if compared > experts.num_experts and uneven:
            logger.warning(f"{num_ranks} ranks divide none of {uneven}: expert shards are padded, some ranks hold none")
            experts.num_experts = compared


def _sum_reductions(model: nn.Module) -> None:
    """gloo has no PREMUL_SUM, which FSDP asks for with a divide factor of 1.0; failing poisons the group."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
