"""An HF config.json (dense or converted; Llama, Mistral, Qwen2, Qwen3) -> the config of a `LamellaDecoder`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lamella.architecture.converted import attention_experts_config, ffn_config
from lamella.architecture.model import trainable_sizes
from lamella.architecture.moe import AttentionMoEConfig, ExpertPath, MoEConfig
from lamella.architecture.names import TITAN_LLAMA3
from lamella.architecture.sizes import check_experts
from lamella.architecture.types import Sizes
from lamella.checkpoint.check import read_config
from lamella.checkpoint.source import read_stored_config
from lamella.errors import UserError
from lamella.jsons import Json
from lamella.titan.attention import ExpertAttention, RoutedHeads
from lamella.titan.block import Block, ScaledRoPE
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.inner_attention import inner_attention
from lamella.titan.moe import UNSET, MoELayer

# isort: split
from torchtitan.models.common.attention import GQAttention, QKVLinear
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import RMSNorm


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
    folder: str | Path, attention: str = "sdpa", expert_path: ExpertPath = "auto", seq_len: int | None = None
) -> LamellaDecoder.Config:
    """The torchtitan config of the model in `folder`.

    Args:
        attention: sdpa, flex or varlen.
        seq_len: tokens per sample, to refuse a sliding window that could not be kept.
    """
    sizes, moe, attention_moe = read_hf_config(folder)
    if attention_moe is not None:
        check_experts(attention_moe.num_experts, sizes.N, sizes.G)
    window = _sliding_window(sizes, seq_len)
    return LamellaDecoder.Config(
        dim=sizes.D,
        vocab_size=sizes.V,
        sliding_window=window,
        enable_weight_tying=sizes.tied,
        tok_embeddings=Embedding.Config(num_embeddings=sizes.V, embedding_dim=sizes.D, param_init=UNSET),
        norm=_norm(sizes.D, sizes),
        lm_head=_linear(sizes.D, sizes.V),
        layers=[
            _block(i, sizes, moe, _attention(i, sizes, attention_moe, attention, window), expert_path)
            for i in range(sizes.num_layers)
        ],
    )


def _block(
    index: int, sizes: Sizes, moe: MoEConfig | None, attention: GQAttention.Config, expert_path: ExpertPath
) -> Block.Config:
    D, F, bias = sizes.D, sizes.F, sizes.mlp_bias
    config = Block.Config(attention=attention, attention_norm=_norm(D, sizes), ffn_norm=_norm(D, sizes))
    if moe is not None and index in moe.moe_layers:
        config.moe_layer = MoELayer.Config(dim=D, moe=moe.for_layer(index), expert_path=expert_path, param_init=UNSET)
    else:
        config.feed_forward = FeedForward.Config(w1=_linear(D, F, bias), w2=_linear(F, D, bias), w3=_linear(D, F, bias))
    return config


def _attention(
    index: int, sizes: Sizes, moe: AttentionMoEConfig | None, kind: str, window: int | None
) -> GQAttention.Config:
    D, heads, kv_heads, H = sizes.D, sizes.N, sizes.G, sizes.H
    qkv_bias = sizes.qkv_bias
    settings: Json = {
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "dim": D,
        "head_dim": H,
        "qkv_linear": QKVLinear.Config(
            head_dim=H, wq=_linear(D, heads * H, qkv_bias), wkv=_linear(D, kv_heads * H, qkv_bias)
        ),
        "wo": _linear(heads * H, D, sizes.output_bias),
        "qk_norm": _norm(H, sizes) if sizes.qk_norm else None,
        "inner_attention": inner_attention(kind, window),
        "rope": rope_config(sizes),
    }
    if moe is None or index not in moe.layers:
        return GQAttention.Config(**settings)
    return ExpertAttention.Config(**settings, heads=RoutedHeads.Config(dim=D, moe=moe, param_init=UNSET))


def rope_config(sizes: Sizes) -> ScaledRoPE.Config:
    """Rotary embedding with the scaling the model was trained with; UserError for one that is not carried."""
    rope = sizes.rope
    assert rope is not None, "families that are trained have a rope"
    config = ScaledRoPE.Config(dim=sizes.H, max_seq_len=sizes.max_positions, theta=rope["rope_theta"])
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


def _sliding_window(sizes: Sizes, seq_len: int | None) -> int | None:
    """The window that all layers share. Windows that some layers lack matter only to longer samples."""
    windows = set(sizes.windows)
    if len(windows) == 1:
        return windows.pop()
    shortest = min(window for window in windows if window is not None)
    if seq_len is not None and seq_len > shortest:
        raise UserError(
            f"some layers attend to a window of {shortest} tokens only; choose a seq_len of at most {shortest}"
        )
    return None


def _norm(width: int, sizes: Sizes) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=width, eps=sizes.values["rms_norm_eps"], param_init=UNSET)


def _linear(n_in: int, n_out: int, bias: bool = False) -> Linear.Config:
    return Linear.Config(in_features=n_in, out_features=n_out, bias=bias, param_init=UNSET)
