"""The transformers home: stock Llama-family models, GPT-2 and OPT whose FFNs are `MoELayer` layers.

Norms, embeddings, rope and generation are transformers' own classes; only the FFN differs, and `layer.self_attn`
where the config has an entry `attention_moe` (lamella.hf.attention), with or without experts in the FFNs.
Importing this module registers the models with transformers' Auto classes. The maths is in
`lamella.moe.experts.moe_ffn`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from lamella.architecture.moe import DENSE_BIAS, AttentionMoEConfig, ExpertPath, Mode, MoEConfig
from lamella.architecture.two_matrix import MASKS
from lamella.errors import UserError, check_choice
from lamella.hf.attention import AttentionExperts, AttentionRouter, install_attention_experts
from lamella.hf.blocks import MoELayer, PackedExperts, Router, Shared, decoder_layers, replace_ffn
from lamella.hf.computing import Computing


class ConvertedForCausalLM(PreTrainedModel):
    """Mixin ahead of a stock *ForCausalLM: swaps in the layers named by `config.moe` and `config.attention_moe`."""

    # A bf16 bias would lose the small steps of the balancing; transformers keeps tensors of this name in fp32.
    _keep_in_fp32_modules_strict = ["selection_bias"]  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.computing = Computing()
        """What all its layers compute; `set_mode` and `set_expert_path` change it."""
        attention = getattr(config, "attention_moe", None)
        if config.moe is None and attention is None:
            raise UserError("config.json has neither an entry moe nor attention_moe; convert the model again")
        if config.moe is not None:
            moe = MoEConfig.from_dict(config.moe)
            for index in moe.moe_layers:
                block = MoELayer(config.hidden_size, moe.for_layer(index), self.computing)
                replace_ffn(decoder_layers(self)[index], block.apply(self._init_weights))
        if attention is not None:
            install_attention_experts(self, AttentionMoEConfig.from_dict(attention), self.computing)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model, then freeze its frozen experts again: transformers makes every parameter trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for layer in model.moe_layers:
            for parameter in layer.experts.frozen_parameters():
                parameter.requires_grad_(False)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PackedExperts | Shared):
            std = getattr(self.config, "initializer_range", None) or self.config.init_std  # OPT's name for it
            for name, parameter in module.named_parameters():
                parameter.normal_(std=0 if name.startswith("lora_") and name.endswith("_b") else std)
        elif isinstance(module, Router):
            for parameter in module.parameters():
                parameter.zero_()
            module.selection_bias.fill_(DENSE_BIAS)
        elif isinstance(module, MoELayer) and module.output_bias is not None:
            module.output_bias.zero_()
        elif isinstance(module, AttentionRouter):
            module.zero()

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The layers whose FFNs are experts."""
        return [m for m in self.modules() if isinstance(m, MoELayer)]

    @property
    def attention_experts(self) -> list[AttentionExperts]:
        """The layers whose attention is experts."""
        return [m for m in self.modules() if isinstance(m, AttentionExperts)]

    def set_mode(self, mode: Mode) -> None:
        """Let every layer compute this mode from now on (see `lamella.architecture.moe.Mode`).

        For attention experts "dense" and "learned" are all experts with weight 1, which is the dense attention.
        """
        check_choice("mode", mode, get_args(Mode))
        self.computing.mode = mode

    def set_expert_path(self, path: ExpertPath) -> None:
        """Let every MoE layer compute by this path from now on (see `lamella.moe.paths.choose`)."""
        check_choice("expert path", path, get_args(ExpertPath))
        for layer in self.moe_layers:
            if path not in ("auto", "loop") and not layer.config.gated:
                raise UserError(f"expert path is {path!r}, but experts of two matrices have 'loop' alone")
        self.computing.path = path


class LamellaLlamaConfig(LlamaConfig):
    """LlamaConfig with the entries of a converted model."""

    model_type = "lamella_llama"
    moe: dict | None = None
    attention_moe: dict | None = None


class LamellaMistralConfig(MistralConfig):
    """MistralConfig with the entries of a converted model."""

    model_type = "lamella_mistral"
    moe: dict | None = None
    attention_moe: dict | None = None


class LamellaQwen2Config(Qwen2Config):
    """Qwen2Config with the entries of a converted model."""

    model_type = "lamella_qwen2"
    moe: dict | None = None
    attention_moe: dict | None = None


class LamellaQwen3Config(Qwen3Config):
    """Qwen3Config with the entries of a converted model."""

    model_type = "lamella_qwen3"
    moe: dict | None = None
    attention_moe: dict | None = None


class LamellaGPT2Config(GPT2Config):
    """GPT2Config with the entries of a converted model."""

    model_type = "lamella_gpt2"
    moe: dict | None = None
    attention_moe: dict | None = None


class LamellaOPTConfig(OPTConfig):
    """OPTConfig with the entries of a converted model."""

    model_type = "lamella_opt"
    moe: dict | None = None
    attention_moe: dict | None = None


class LamellaLlamaForCausalLM(ConvertedForCausalLM, LlamaForCausalLM):
    """A converted Llama."""

    config_class = LamellaLlamaConfig


class LamellaMistralForCausalLM(ConvertedForCausalLM, MistralForCausalLM):
    """A converted Mistral."""

    config_class = LamellaMistralConfig


class LamellaQwen2ForCausalLM(ConvertedForCausalLM, Qwen2ForCausalLM):
    """A converted Qwen2."""

    config_class = LamellaQwen2Config


class LamellaQwen3ForCausalLM(ConvertedForCausalLM, Qwen3ForCausalLM):
    """A converted Qwen3."""

    config_class = LamellaQwen3Config


class LamellaGPT2ForCausalLM(ConvertedForCausalLM, GPT2LMHeadModel):
    """A converted GPT-2."""

    config_class = LamellaGPT2Config


class LamellaOPTForCausalLM(ConvertedForCausalLM, OPTForCausalLM):
    """A converted OPT."""

    config_class = LamellaOPTConfig


# dense model_type -> the class of its converted form
CONVERTED_MODELS: dict[str, type[ConvertedForCausalLM]] = {
    "llama": LamellaLlamaForCausalLM,
    "mistral": LamellaMistralForCausalLM,
    "qwen2": LamellaQwen2ForCausalLM,
    "qwen3": LamellaQwen3ForCausalLM,
    "gpt2": LamellaGPT2ForCausalLM,
    "opt": LamellaOPTForCausalLM,
}
for _model in CONVERTED_MODELS.values():
    assert _model.config_class is not None
    AutoConfig.register(_model.config_class.model_type, _model.config_class)
    AutoModelForCausalLM.register(_model.config_class, _model)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Inside, transformers draws no progress bars: the commands have a display of their own."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


def load(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu", **kwargs: object
) -> PreTrainedModel:
    """A dense or converted checkpoint as an evaluating transformers model.

    Args:
        folder: a local folder (or hub name) that AutoModelForCausalLM can read.
        dtype: torch dtype, or "auto" for that of the file.

    Raises:
        UserError: tensors of the architecture are missing from the file (transformers would draw them at random).
    """
    with quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    model, info = loaded
    # GPT-2's masks, which old files hold and transformers computes
    info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not name.endswith(MASKS)}
    wrong = {kind: names for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if (names := info[kind])}
    if wrong:
        raise UserError(f"{folder} does not match its config: {wrong}; convert or export it again")
    return model.to(device).eval()
