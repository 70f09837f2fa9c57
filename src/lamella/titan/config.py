"""An HF config.json, dense or converted, of a family that trains -> the config of a `LamellaDecoder`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

from lamella.architecture.converted import attention_experts_config, ffn_config
from lamella.architecture.model import trainable_sizes
from lamella.architecture.moe import AttentionMoEConfig, ExpertPath, MoEConfig
from lamella.architecture.names import TITAN_LLAMA3
from lamella.architecture.sizes import check_experts
from lamella.architecture.two_matrix import check_activation
from lamella.architecture.types import Sizes
from lamella.checkpoint.check import read_config
from lamella.checkpoint.source import read_stored_config
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.titan.attention import ExpertAttention, RoutedHeads
from lamella.titan.block import Block, ScaledRoPE
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.inner_attention import inner_attention
from lamella.titan.kin import (
    AllHeadsNorm,
    GatedFFN,
    JoinedFFN,
    JoinedQKVLinear,
    KinAttention,
    OffsetNorm,
    ScaledEmbedding,
    ScaledLinear,
)
from lamella.titan.moe import UNSET, MoELayer

# isort: split
from torchtitan.models.common.attention import GQAttention, QKVLinear
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import Identity, RMSNorm


class ModelConfig(NamedTuple):
    """What a config.json says."""

    sizes: Sizes
    moe: MoEConfig | None
    attention_moe: AttentionMoEConfig | None

    @property
    def has_experts(self) -> bool:
        """Whether FFNs or attention of the model are experts."""
        return self.moe is not None or self.attention_moe is not None


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The config.json of a model folder, and what its weights say of the output head.

    Raises:
        UserError: no config.json, or a model that cannot be trained.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it holds no config.json")
    trainable_sizes(read_config(Path(folder)))
    config = read_stored_config(Path(folder))
    return ModelConfig(trainable_sizes(config), ffn_config(config), attention_experts_config(config))


def decoder_config(
    folder: str | Path, attention: str = "sdpa", expert_path: ExpertPath = "auto"
) -> LamellaDecoder.Config:
    """The torchtitan config of the model in `folder`.

    Args:
        attention: sdpa, flex or varlen.
    """
    sizes, moe, attention_moe = read_hf_config(folder)
    if attention_moe is not None:
        check_experts(attention_moe.num_experts, sizes.N, sizes.G)
    windows = tuple(dict.fromkeys(sizes.windows))
    return LamellaDecoder.Config(
        dim=sizes.D,
        vocab_size=sizes.V,
        sliding_window=windows[0] if len(windows) == 1 else None,
        windows=windows if len(windows) > 1 else (),
        enable_weight_tying=sizes.tied,
        tok_embeddings=_embedding(sizes),
        norm=_norm(sizes.D, sizes),
        lm_head=_head(sizes),
        layers=[
            _block(i, sizes, moe, _attention(i, sizes, attention_moe, attention), expert_path)
            for i in range(sizes.num_layers)
        ],
    )


def _block(
    index: int, sizes: Sizes, moe: MoEConfig | None, attention: GQAttention.Config, expert_path: ExpertPath
) -> Block.Config:
    D, behind = sizes.D, sizes.family.kind.norms_behind
    config = Block.Config(
        attention=attention,
        attention_norm=Identity.Config() if behind else _norm(D, sizes),
        ffn_norm=_norm(D, sizes),
        post_ffn_norm=_norm(D, sizes) if behind else None,
        residual_scale=sizes.residual_scale,
        window=sizes.windows[index],
    )
    if moe is not None and index in moe.moe_layers:
        config.moe_layer = MoELayer.Config(dim=D, moe=moe.for_layer(index), expert_path=expert_path, param_init=UNSET)
    else:
        config.feed_forward = _ffn(sizes)
    return config


def _ffn(sizes: Sizes) -> FeedForward.Config | JoinedFFN.Config:
    D, F, bias, activation = sizes.D, sizes.F, sizes.mlp_bias, check_activation(sizes)
    if sizes.family.kind.fused:
        return JoinedFFN.Config(w13=_linear(D, 2 * F), w2=_linear(F, D), activation=activation)
    matrices = {"w1": _linear(D, F, bias), "w2": _linear(F, D, bias), "w3": _linear(D, F, bias)}
    if activation == "silu":
        return FeedForward.Config(**matrices)
    return GatedFFN.Config(**matrices, activation=activation)


def _attention(index: int, sizes: Sizes, moe: AttentionMoEConfig | None, kind: str) -> GQAttention.Config:
    D, heads, kv_heads, H = sizes.D, sizes.N, sizes.G, sizes.H
    settings: Json = {
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "dim": D,
        "head_dim": H,
        "qkv_linear": _qkv(sizes),
        "wo": _linear(heads * H, D, sizes.output_bias),
        "qk_norm": _norm(H, sizes) if sizes.qk_norm else None,
        "inner_attention": inner_attention(kind, sizes.windows[index]),
        "rope": dataclasses.replace(rope_config(sizes), rotates=sizes.rotates[index]),
    }
    if sizes.attention_scale != H**-0.5 or sizes.family.kind.wide_qk_norm:
        return KinAttention.Config(**settings, scale=sizes.attention_scale, **_wide_norms(sizes))
    if moe is None or index not in moe.layers:
        return GQAttention.Config(**settings)
    return ExpertAttention.Config(**settings, heads=RoutedHeads.Config(dim=D, moe=moe, param_init=UNSET))


def _qkv(sizes: Sizes) -> QKVLinear.Config | JoinedQKVLinear.Config:
    D, Q, K, H = sizes.D, sizes.N * sizes.H, sizes.G * sizes.H, sizes.H
    if sizes.family.kind.fused:
        joined = _linear(D, Q + 2 * K, sizes.qkv_bias)
        return JoinedQKVLinear.Config(head_dim=H, n_heads=sizes.N, n_kv_heads=sizes.G, wqkv=joined)
    return QKVLinear.Config(head_dim=H, wq=_linear(D, Q, sizes.qkv_bias), wkv=_linear(D, K, sizes.qkv_bias))


def _wide_norms(sizes: Sizes) -> dict[str, AllHeadsNorm.Config]:
    if not sizes.family.kind.wide_qk_norm:
        return {}
    eps = sizes.values["rms_norm_eps"]
    return {
        name: AllHeadsNorm.Config(normalized_shape=heads * sizes.H, eps=eps, param_init=UNSET)
        for name, heads in (("q_norm", sizes.N), ("k_norm", sizes.G))
    }


def rope_config(sizes: Sizes) -> ScaledRoPE.Config:
    """Rotary embedding with the scaling the model was trained with; UserError for one that is not carried."""
    rope = sizes.rope
    assert rope is not None, "families that are trained have a rope"
    dim = int(sizes.H * rope.get("partial_rotary_factor", 1.0)) if sizes.family.kind.rotates_part else sizes.H
    config = ScaledRoPE.Config(dim=dim, max_seq_len=sizes.max_positions, theta=rope["rope_theta"])
    match rope.get("rope_type", "default"):
        case "default":
            pass
        case "linear":
            config.linear_factor = rope["factor"]
        case "llama3":
            config.scaling = TITAN_LLAMA3
            config.scaling_factor = rope["factor"]
            config.low_freq_factor, config.high_freq_factor = rope["low_freq_factor"], rope["high_freq_factor"]
            config.original_max_position_embeddings = rope["original_max_position_embeddings"]
        case other:
            raise UserError(f"rope scaling {other!r} cannot be trained; default, linear and llama3 can")
    return config


def _norm(width: int, sizes: Sizes) -> RMSNorm.Config:
    eps, offset = sizes.values["rms_norm_eps"], sizes.family.kind.norm_offset
    if offset:
        return OffsetNorm.Config(normalized_shape=width, eps=eps, offset=offset, param_init=UNSET)
    return RMSNorm.Config(normalized_shape=width, eps=eps, param_init=UNSET)


def _embedding(sizes: Sizes) -> Embedding.Config:
    shape = {"num_embeddings": sizes.V, "embedding_dim": sizes.D}
    if sizes.embedding_scale == 1.0:
        return Embedding.Config(**shape, param_init=UNSET)
    rounds = sizes.family.kind.embedding_by_width
    return ScaledEmbedding.Config(**shape, scale=sizes.embedding_scale, rounds=rounds, param_init=UNSET)


def _head(sizes: Sizes) -> Linear.Config:
    if sizes.logit_scale == 1.0:
        return _linear(sizes.D, sizes.V)
    return ScaledLinear.Config(in_features=sizes.D, out_features=sizes.V, scale=sizes.logit_scale, param_init=UNSET)


def _linear(n_in: int, n_out: int, bias: bool = False) -> Linear.Config:
    return Linear.Config(in_features=n_in, out_features=n_out, bias=bias, param_init=UNSET)
