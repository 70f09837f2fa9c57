"""An HF config.json (dense or converted; Llama, Mistral, Qwen2, Qwen3) -> the config of a `LamellaDecoder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from lamella.architecture.moe import AttentionMoEConfig, ExpertPath, MoEConfig
from lamella.architecture.sizes import check_experts
from lamella.errors import UserError, did_you_mean
from lamella.jsons import Json
from lamella.titan.attention import ExpertAttention, RoutedHeads
from lamella.titan.decoder import Block, LamellaDecoder, ScaledRoPE
from lamella.titan.inner_attention import inner_attention
from lamella.titan.moe import UNSET, MoELayer

# isort: split
from torchtitan.models.common.attention import GQAttention, QKVLinear
from torchtitan.models.common.embedding import Embedding
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.nn_modules import RMSNorm
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


class ModelConfig(NamedTuple):
    """What a config.json says."""

    family: str
    hf: PreTrainedConfig
    """transformers' config with its defaults filled in."""
    moe: MoEConfig | None
    attention_moe: AttentionMoEConfig | None

    @property
    def has_experts(self) -> bool:
        """Whether FFNs or attention of the model are experts."""
        return self.moe is not None or self.attention_moe is not None


def read_hf_config(folder: str | Path) -> ModelConfig:
    """The config.json of a model folder.

    Raises:
        UserError: no config.json, or an architecture that is not among `FAMILIES`.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no model folder: it holds no config.json")
    raw = json.loads(path.read_text())
    family = str(raw.pop("model_type", "")).removeprefix("lamella_")
    if family not in FAMILIES:
        raise UserError(
            f"model_type {family!r} cannot be trained{did_you_mean(family, FAMILIES)}; {', '.join(FAMILIES)} can"
        )
    moe, attention_moe = raw.pop("moe", None), raw.pop("attention_moe", None)
    for key in ("architectures", "auto_map"):
        raw.pop(key, None)
    return ModelConfig(
        family,
        FAMILIES[family].from_dict(raw),
        None if moe is None else MoEConfig.from_dict(moe),
        None if attention_moe is None else AttentionMoEConfig.from_dict(attention_moe),
    )


def decoder_config(
    folder: str | Path, attention: str = "sdpa", expert_path: ExpertPath = "auto", seq_len: int | None = None
) -> LamellaDecoder.Config:
    """The torchtitan config of the model in `folder`.

    Args:
        attention: sdpa, flex or varlen.
        seq_len: tokens per sample, to refuse a sliding window that could not be kept.
    """
    family, hf, moe, attention_moe = read_hf_config(folder)
    if attention_moe is not None:
        check_experts(attention_moe.num_experts, hf.num_attention_heads, hf.num_key_value_heads)
    if hf.hidden_act not in ("silu", "swish"):
        raise UserError(f"the activation {hf.hidden_act!r} cannot be trained; only silu (gated) can")
    window = _sliding_window(hf, seq_len)
    return LamellaDecoder.Config(
        dim=hf.hidden_size,
        vocab_size=hf.vocab_size,
        sliding_window=window,
        enable_weight_tying=hf.tie_word_embeddings,
        tok_embeddings=Embedding.Config(num_embeddings=hf.vocab_size, embedding_dim=hf.hidden_size, param_init=UNSET),
        norm=_norm(hf.hidden_size, hf),
        lm_head=_linear(hf.hidden_size, hf.vocab_size),
        layers=[
            _block(i, hf, moe, _attention(i, family, hf, attention_moe, attention, window), expert_path)
            for i in range(hf.num_hidden_layers)
        ],
    )


def _block(
    index: int, hf: PreTrainedConfig, moe: MoEConfig | None, attention: GQAttention.Config, expert_path: ExpertPath
) -> Block.Config:
    D, F = hf.hidden_size, hf.intermediate_size
    config = Block.Config(attention=attention, attention_norm=_norm(D, hf), ffn_norm=_norm(D, hf))
    if moe is not None and index in moe.moe_layers:
        config.moe_layer = MoELayer.Config(dim=D, moe=moe.for_layer(index), expert_path=expert_path, param_init=UNSET)
    else:
        bias = bool(getattr(hf, "mlp_bias", False))
        config.feed_forward = FeedForward.Config(w1=_linear(D, F, bias), w2=_linear(F, D, bias), w3=_linear(D, F, bias))
    return config


def _attention(
    index: int, family: str, hf: PreTrainedConfig, moe: AttentionMoEConfig | None, kind: str, window: int | None
) -> GQAttention.Config:
    D, heads, kv_heads = hf.hidden_size, hf.num_attention_heads, hf.num_key_value_heads
    H = getattr(hf, "head_dim", None) or D // heads
    out_bias = bool(getattr(hf, "attention_bias", False))
    qkv_bias = out_bias or family == "qwen2"  # Qwen2 has them always, and none on the output
    settings: Json = {
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "dim": D,
        "head_dim": H,
        "qkv_linear": QKVLinear.Config(
            head_dim=H, wq=_linear(D, heads * H, qkv_bias), wkv=_linear(D, kv_heads * H, qkv_bias)
        ),
        "wo": _linear(heads * H, D, out_bias),
        "qk_norm": _norm(H, hf) if family == "qwen3" else None,
        "inner_attention": inner_attention(kind, window),
        "rope": rope_config(hf, H),
    }
    if moe is None or index not in moe.layers:
        return GQAttention.Config(**settings)
    return ExpertAttention.Config(**settings, heads=RoutedHeads.Config(dim=D, moe=moe, param_init=UNSET))


def rope_config(hf: PreTrainedConfig, head_dim: int) -> ScaledRoPE.Config:
    """Rotary embedding with the scaling the model was trained with; UserError for one that is not carried."""
    rope: Json = hf.rope_parameters
    config = ScaledRoPE.Config(dim=head_dim, max_seq_len=hf.max_position_embeddings, theta=rope["rope_theta"])
    match rope.get("rope_type", "default"):
        case "default":
            pass
        case "linear":
            config.linear_factor = rope["factor"]
        case "llama3":
            config.scaling = "llama"
            config.scaling_factor = rope["factor"]
            config.low_freq_factor, config.high_freq_factor = rope["low_freq_factor"], rope["high_freq_factor"]
            config.original_max_position_embeddings = rope["original_max_position_embeddings"]
        case other:
            raise UserError(f"rope scaling {other!r} cannot be trained; default, linear and llama3 can")
    return config


def _sliding_window(hf: PreTrainedConfig, seq_len: int | None) -> int | None:
    """The window that all layers share. Windows that some layers lack matter only to longer samples."""
    window = getattr(hf, "sliding_window", None)
    if window is None or not getattr(hf, "use_sliding_window", True):
        return None
    kinds = set(getattr(hf, "layer_types", None) or ["sliding_attention"])
    if kinds == {"sliding_attention"}:
        return window
    if seq_len is not None and seq_len > window and "sliding_attention" in kinds:
        raise UserError(f"some layers attend to a window of {window} tokens only; choose a seq_len of at most {window}")
    return None


def _norm(width: int, hf: PreTrainedConfig) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=width, eps=hf.rms_norm_eps, param_init=UNSET)


def _linear(n_in: int, n_out: int, bias: bool = False) -> Linear.Config:
    return Linear.Config(in_features=n_in, out_features=n_out, bias=bias, param_init=UNSET)
