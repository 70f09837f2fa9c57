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
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from lamella.architecture.adapters import AdaptersConfig
from lamella.architecture.converted import ENTRIES
from lamella.architecture.moe import DENSE_BIAS, AttentionMoEConfig, ExpertPath, Mode, MoEConfig
from lamella.architecture.moe_tensors import EXPERT_PATTERN, SELECTION_BIAS
from lamella.architecture.rows import CONVERTED_PREFIX, FAMILIES
from lamella.architecture.types import Family
from lamella.errors import UserError, check_choice
from lamella.hf.adapters import AdapterRouter, Adapters, install_adapters
from lamella.hf.attention import AttentionExperts, AttentionRouter, install_attention_experts
from lamella.hf.blocks import (
    MoELayer,
    PackedExperts,
    Router,
    Shared,
    are_experts_elsewhere,
    decoder_layers,
    replace_ffn,
)
from lamella.hf.computing import Computing
from lamella.hf.stored import give_stored_experts, rounded_in_file


class ConvertedForCausalLM(PreTrainedModel):
    """Mixin ahead of a stock *ForCausalLM: swaps in the layers named by the entries of its config (see ENTRIES)."""

    # A bf16 bias would lose the small steps of the balancing; transformers keeps tensors of this name in fp32.
    _keep_in_fp32_modules_strict = [SELECTION_BIAS]  # noqa: RUF012

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.computing = Computing()
        """What all its layers compute; `set_mode` and `set_expert_path` change it."""
        attention = getattr(config, "attention_moe", None)
        adapters = getattr(config, "adapters", None)
        if config.moe is None and attention is None and adapters is None:
            raise UserError("config.json has no entry moe, attention_moe or adapters; convert the model again")
        moe = None if config.moe is None else MoEConfig.from_dict(config.moe)
        if are_experts_elsewhere() or (moe is not None and moe.frozen_dtype != "model"):
            self._keys_to_ignore_on_load_unexpected = {EXPERT_PATTERN}
        if moe is not None:
            for index in moe.moe_layers:
                block = MoELayer(config.hidden_size, moe.for_layer(index), self.computing)
                replace_ffn(decoder_layers(self)[index], block.apply(self._init_weights))
        if attention is not None:
            install_attention_experts(self, AttentionMoEConfig.from_dict(attention), self.computing)
        if adapters is not None:
            install_adapters(self, AdaptersConfig.from_dict(adapters), self.computing)

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
        elif isinstance(module, AdapterRouter):
            module.to_zero_expert()
        elif isinstance(module, Adapters):
            for parameter in module.parameters():
                parameter.zero_()

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

    def set_top_k(self, top_k: int | None) -> None:
        """Let every MoE layer take this many experts per token from now on; None: its own number.

        Raises:
            UserError: twin routing, which needs one of each pair, or a layer that has fewer experts.
        """
        if top_k is not None:
            if not self.moe_layers or any(layer.config.routing == "twin" for layer in self.moe_layers):
                raise UserError("top-k is of flat routing; twin routing takes one expert of each pair (see --twins)")
            fewest = min(layer.config.num_experts for layer in self.moe_layers)
            if not 1 <= top_k <= fewest:
                raise UserError(f"top-k is {top_k}; it must be between 1 and the {fewest} experts of a layer")
        self.computing.top_k = top_k

    def set_twin_share(self, share: float | None) -> None:
        """Let at most this share of a token's pairs take the trained copy; None: as many as the router says.

        Raises:
            UserError: a model without twins, or no share.
        """
        if share is not None:
            if not self.moe_layers or any(layer.config.routing != "twin" for layer in self.moe_layers):
                raise UserError("a share of twins is of sliced models with twin routing; this model has another")
            if not 0 <= share <= 1:
                raise UserError(f"the share of twins is {share}; it must be between 0 and 1")
        self.computing.twin_share = share

    def set_expert_path(self, path: ExpertPath) -> None:
        """Let every MoE layer compute by this path from now on (see `lamella.moe.paths.choose`)."""
        check_choice("expert path", path, get_args(ExpertPath))
        for layer in self.moe_layers:
            if path not in ("auto", "loop") and not layer.config.gated:
                raise UserError(f"expert path is {path!r}, but experts of two matrices have 'loop' alone")
        self.computing.path = path


def _converted_model(family: Family) -> type[ConvertedForCausalLM]:
    """The family's classes, `Lamella...Config` and `Lamella...ForCausalLM`: transformers' own, and the entries."""
    dense: Any = getattr(transformers, family.architecture)
    dense_config: Any = CONFIG_MAPPING[family.name]
    entries = dict.fromkeys(ENTRIES)
    config = type(
        family.converted_config_class,
        (dense_config,),
        {"model_type": CONVERTED_PREFIX + family.name, "__annotations__": dict.fromkeys(entries, dict | None)}
        | entries
        | {"__module__": __name__},
    )
    model = type(
        family.converted_architecture,
        (ConvertedForCausalLM, dense),
        {"config_class": config, "__module__": __name__},
    )
    globals().update({config.__name__: config, model.__name__: model})  # modeling_lamella.py imports them by name
    AutoConfig.register(CONVERTED_PREFIX + family.name, config)
    AutoModelForCausalLM.register(config, model)
    return model


# dense model_type -> the class of its converted form
CONVERTED_MODELS = {name: _converted_model(family) for name, family in FAMILIES.items()}


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

    Frozen experts that are rounded in the file of a local folder stay so.
    """
    with quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **kwargs)
    model, info = loaded
    # such as GPT-2's masks, which old files hold and transformers computes
    ignored = tuple(end for family in FAMILIES.values() for end in family.ignored)
    info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not name.endswith(ignored)}
    wrong = {kind: names for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if (names := info[kind])}
    if wrong:
        raise UserError(f"{folder} does not match its config: {wrong}; convert or export it again")
    model = model.to(device).eval()
    if not are_experts_elsewhere() and rounded_in_file(folder):
        give_stored_experts(model, Path(folder))
    return model
