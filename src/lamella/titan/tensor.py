"""Tensor parallelism: ranks share out attention heads, dense FFN neurons and vocabulary; between them, the tokens.

torchtitan's own sharding of a decoder, with sequence parallelism: norms and the MoE see each rank's part of the
sequence. So the MoE needs no cut through its experts: expert parallelism shares them out over the same ranks.
"""

from __future__ import annotations

import spmd_types as spmd
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import (
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    set_decoder_sharding_config,
    set_dense_ffn_sharding,
    set_gqa_attention_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.protocols.sharding import ShardingConfig


def set_sharding(config: Decoder.Config) -> None:
    """Say in a decoder's config how `Module.parallelize` shares out all but the MoE layers."""
    set_decoder_sharding_config(config, enable_sp=True)
    for layer in config.layers:
        layer.attention_norm.sharding_config = layer.ffn_norm.sharding_config = norm_config(enable_sp=True)
        set_gqa_attention_sharding(layer.attention, enable_sp=True)
        set_gqa_inner_attention_local_map(layer.attention.inner_attention)
        if layer.attention.qk_norm is not None:
            layer.attention.qk_norm.sharding_config = _head_norm()
        if layer.feed_forward is not None:
            tokens = dense_sequence_parallel_placement()
            set_dense_ffn_sharding(layer.feed_forward, attn_x_layout=tokens, enable_sp=True)


def _head_norm() -> ShardingConfig:
    """Each rank normalises its own heads."""
    heads = dense_activation_placement(tp=spmd.S(2))
    weight = {"weight": dense_param_placement(tp=spmd.R)}
    return ShardingConfig(state_shardings=weight, in_src_shardings={"input": heads}, out_src_shardings=heads)


def replicate(module: nn.Module, mesh: DeviceMesh) -> None:
    """Hold a module's own parameters whole on every rank of the mesh; their gradients are summed over it."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter.data, mesh, [Replicate()])
        module.register_parameter(name, nn.Parameter(whole, parameter.requires_grad))
