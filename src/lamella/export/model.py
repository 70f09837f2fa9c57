"""The model that is to be exported, as every target asks for it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lamella.architecture.converted import (
    attention_prefix,
    converted_family,
    converted_tensors,
    dense_config,
    ffn_config,
)
from lamella.architecture.families import HEAD, Family, Sizes, may_be_stored, sizes_of
from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.architecture.moe_tensors import GATE_SCALE, SELECTION_BIAS, router_name
from lamella.checkpoint.check import check_tensors, read_config
from lamella.checkpoint.dtypes import DTYPES
from lamella.checkpoint.source import read_folder, read_stored_config
from lamella.checkpoint.tensors import SourceTensor
from lamella.errors import UserError
from lamella.jsons import Json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EMBEDDING = "model.embed_tokens.weight"


class AttentionExtras(NamedTuple):
    """What the attention has beside its four matrices."""

    qkv_bias: bool
    output_bias: bool
    qk_norm: bool


@dataclass(frozen=True)
class ConvertedModel:
    """A converted folder whose tensors have been held against its config; no weight is read."""

    folder: Path
    config: Json
    tensors: dict[str, SourceTensor]
    written_as: str | None = None
    """The code of the dtype that its weights are to be stored in; None: their own."""

    @classmethod
    def open(cls, folder: Path, written_as: str | None = None) -> ConvertedModel:
        """UserError where the folder is no converted model, or its tensors are not those of its config."""
        converted_family(read_config(folder))
        config = read_stored_config(folder)
        if config.get("adapters") is not None:
            raise UserError(f"{folder} has adapters as experts; merge them first: lamella adapters export --to moe")
        tensors, dense = read_folder(folder), dense_config(config)
        check_tensors(tensors, converted_tensors(config), str(folder), lambda name: may_be_stored(name, dense))
        return cls(folder, config, tensors, written_as)

    @property
    def family(self) -> Family:
        """The dense model's."""
        return converted_family(self.config)

    @cached_property
    def sizes(self) -> Sizes:
        """What the config.json means."""
        return sizes_of(self.config)

    @cached_property
    def dense(self) -> Json:
        """config.json of the dense model."""
        return dense_config(self.config)

    @cached_property
    def dense_hf(self) -> PreTrainedConfig:
        """The dense model's config as transformers reads it, with its defaults."""
        from transformers import AutoConfig

        values = copy.deepcopy(self.dense)  # transformers writes into the dicts that it is given
        return AutoConfig.for_model(values.pop("model_type"), **values)

    @cached_property
    def ffn(self) -> MoEConfig | None:
        """None where only attention is experts."""
        return ffn_config(self.config)

    @property
    def moe(self) -> MoEConfig:
        """Of a model whose FFNs are experts."""
        assert self.ffn is not None
        return self.ffn

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, by the embedding."""
        return DTYPES[self.tensors[EMBEDDING].dtype]

    @cached_property
    def attention(self) -> AttentionExtras:
        first = attention_prefix(0)
        names = ("q_proj.bias", "o_proj.bias", "q_norm.weight")
        return AttentionExtras(*(first + name in self.tensors for name in names))

    @property
    def head_dim(self) -> int:
        hf = self.dense_hf
        return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads

    @property
    def head(self) -> SourceTensor:
        """The output head; the embedding where they are tied."""
        return self.tensors.get(HEAD, self.tensors[EMBEDDING])

    @cached_property
    def windows(self) -> list[int | None]:
        """Each layer's attention window, None where it cuts off nothing within the model's context."""
        longest = self.sizes.max_positions
        return [window if window and window < longest else None for window in self.sizes.windows]

    @property
    def rope_type(self) -> str:
        return (self.dense_hf.rope_parameters or {}).get("rope_type", "default")

    def ffn_prefix(self, layer: int) -> str:
        """Of the tensors of a layer's FFN."""
        return ffn_layout(self.config).prefix(layer)

    def has_selection_bias(self) -> bool:
        """Whether the biases ever change which experts are chosen: they differ within a layer."""
        for layer in self.moe.moe_layers:
            bias = self.tensors[self.ffn_prefix(layer) + router_name(SELECTION_BIAS)]
            values = bias.read(0, bias.numel)
            if self.moe.routing == "twin":
                values = torch.cat([values, -values])
            if (values != values[0]).any():
                return True
        return False

    def attention_is_dense(self) -> bool:
        """No attention experts, or all of them chosen with weight exactly 1."""
        entry = self.config.get("attention_moe")
        if entry is None:
            return True
        attention = AttentionMoEConfig.from_dict(entry)
        scales = [self.tensors.get(attention_prefix(layer) + router_name(GATE_SCALE)) for layer in attention.layers]
        weights_are_one = all(scale is not None and not scale.read(0, scale.numel).any() for scale in scales)
        return weights_are_one and attention.num_experts_per_tok == attention.num_experts
