"""What trains, and how the model is laid over the ranks (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lamella.models.titan_device  # noqa: F401  first

# isort: split
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.tools.logging import logger

from lamella.models.titan import LamellaDecoder


def is_trained(name: str, trains: str) -> bool:
    """Whether the parameter of this (torchtitan) name trains; frozen experts never do."""
    if ".experts.frozen_" in name:
        return False
    if ".experts.trainable_" in name or ".moe.shared." in name or name.endswith(".moe.output_bias"):
        return True
    return trains == "all" or (trains == "experts+router" and ".router." in name)


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
    """torchtitan's `parallelize_fn`: freeze, activation checkpointing, FSDP2 (or HSDP) over all ranks."""
    # FSDP keeps each parameter's requires_grad as it finds it
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, model.config.trains))
    if ac_config is not None:
        ac_config.build(dump_folder=dump_folder).apply(model)
    names = ["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"]
    mesh = parallel_dims.get_mesh(names)
    _keep_shards_even(model, mesh.size())
    param_dtype = TORCH_DTYPE_MAP[training.mixed_precision_param]
    whole = _replicated(model, param_dtype) if model.config.frozen_weights == "replicated" else set()
    with _set_aside(model, whole):
        apply_fsdp_to_decoder(
            model,
            mesh,
            param_dtype=param_dtype,
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            pp_enabled=False,
            cpu_offload=training.enable_cpu_offload,
            reshard_after_forward_policy=parallelism.fsdp_reshard_after_forward,
        )
    if not torch.accelerator.is_available():
        _sum_reductions(model)
    return model


def _replicated(model: nn.Module, dtype: torch.dtype) -> set[nn.Parameter]:
    """What does not train, cast to the dtype of the computation, as FSDP does with what it gathers."""
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for parameter in frozen:
        parameter.data = parameter.data.to(dtype)
    return frozen


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


def _keep_shards_even(model: LamellaDecoder, num_ranks: int) -> None:
    """Over more ranks than experts, torchtitan shards dimension 1, which must divide evenly; else pad dimension 0."""
    for layer in model.moe_layers:
        experts = layer.experts
        uneven = [p.shape[1] for p in experts.parameters() if p.shape[1] % num_ranks]
        if num_ranks > experts.num_experts and uneven:
            logger.warning(f"{num_ranks} ranks divide none of {uneven}: expert shards are padded, some ranks hold none")
            experts.num_experts = num_ranks


def _sum_reductions(model: nn.Module) -> None:
    """gloo has no PREMUL_SUM, which FSDP asks for with a divide factor of 1.0; failing poisons the group."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
