"""The parameters of a model, from its config.json alone, by the names that training gives them.

Shapes: V vocabulary, D model width, F FFN width, N heads, G key/value heads, H head width, E experts, R router rows,
f neurons per expert, n neurons of the shared expert.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.errors import UserError, did_you_mean
from lamella.jsons import Json
from lamella.recipe.methods import sizes_of
from lamella.recipe.methods.common import MethodOptions

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Weight:
    """One parameter as it is before the ranks share it out."""

    name: str
    """torchtitan's, as in `lamella.architecture.names`."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """None: embedding, head and last norm."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def is_embedding(self) -> bool:
        """The head's too where they are tied."""
        return self.name == "tok_embeddings.weight"

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to an expert that tokens are routed to."""
        return ".moe.experts." in self.name


@dataclass(frozen=True)
class Model:
    """What config.json says about the sizes of a model."""

    family: str
    D: int
    F: int
    num_layers: int
    N: int
    G: int
    H: int
    V: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    max_positions: int
    dtype: str
    moe: MoEConfig | None
    attention_moe: AttentionMoEConfig | None

    def moe_of(self, layer: int) -> MoEConfig | None:
        """The experts of a layer; None where its FFN is dense."""
        return self.moe.for_layer(layer) if self.moe is not None and layer in self.moe.moe_layers else None

    def heads_of(self, layer: int) -> AttentionMoEConfig | None:
        """The attention experts of a layer; None where it attends with all heads."""
        return self.attention_moe if self.attention_moe is not None and layer in self.attention_moe.layers else None

    def weights(self) -> list[Weight]:
        """All parameters; the selection biases, which are buffers, not."""
        V, D = self.V, self.D
        names = [Weight("tok_embeddings.weight", (V, D)), Weight("norm.weight", (D,))]
        if not self.tied:
            names.append(Weight("lm_head.weight", (V, D)))
        for layer in range(self.num_layers):
            names += [Weight(f"layers.{layer}.{name}", shape) for name, shape in self._layer(layer)]
        return names

    def _layer(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        D, moe = self.D, self.moe_of(layer)
        yield "attention_norm.weight", (D,)
        yield "ffn_norm.weight", (D,)
        yield from self._attention()
        if (heads := self.heads_of(layer)) is not None:
            yield "attention.heads.router.weight", (heads.num_experts, D)
            if heads.gate == "unit":
                yield "attention.heads.router.gate_scale", (heads.num_experts,)
        if moe is not None:
            yield from _experts(D, moe)
            return
        for name, rows, columns in (("w1", self.F, D), ("w2", D, self.F), ("w3", self.F, D)):
            yield f"feed_forward.{name}.weight", (rows, columns)
            if self.mlp_bias:
                yield f"feed_forward.{name}.bias", (rows,)

    def _attention(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        D, q, kv = self.D, self.N * self.H, self.G * self.H
        qkv_bias = self.attention_bias or self.family == "qwen2"
        for name, rows in (("wq", q), ("wk", kv), ("wv", kv)):
            yield f"attention.qkv_linear.{name}.weight", (rows, D)
            if qkv_bias:
                yield f"attention.qkv_linear.{name}.bias", (rows,)
        yield "attention.wo.weight", (D, q)
        if self.attention_bias:
            yield "attention.wo.bias", (D,)
        if self.family == "qwen3":
            yield "attention.q_norm.weight", (self.H,)
            yield "attention.k_norm.weight", (self.H,)


def _experts(D: int, moe: MoEConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    R, f, n = moe.num_router_rows, moe.moe_intermediate_size, moe.shared_intermediate_size
    yield "moe.router.weight", (R, D)
    if moe.router == "analytic":
        yield "moe.router.up_weight", (R, D)
    if moe.gate == "unit":
        yield "moe.router.gate_scale", (R,)
    for kind, E in (("frozen", moe.num_frozen_experts), ("trainable", moe.num_trainable_experts)):
        if E:
            yield f"moe.experts.{kind}_gate_up_proj", (E, 2 * f, D)
            yield f"moe.experts.{kind}_down_proj", (E, D, f)
    for name, shape in moe.lora_shapes(D).items():
        yield f"moe.experts.lora_{name}", shape
    if n:
        yield "moe.shared.gate_up_proj", (2 * n, D)
        yield "moe.shared.down_proj", (D, n)
    if moe.output_bias:
        yield "moe.output_bias", (D,)


def read_model(path: str | Path, options: MethodOptions | None = None) -> Model:
    """The model of a folder, or of a config.json.

    Args:
        options: of a conversion: the model that it would make of this one.

    Raises:
        UserError: no config.json; a family that cannot be trained; a conversion of a model that has experts already.
    """
    file = Path(path) if Path(path).suffix == ".json" else Path(path) / "config.json"
    if not file.is_file():
        raise UserError(
            f"there is no {file}; convert the model first, or give its dense config: --dense FOLDER --slices 8"
        )
    return make_model(json.loads(file.read_text()), str(file), options)


def make_model(values: Json, name: str, options: MethodOptions | None = None) -> Model:
    """The model of what a config.json holds, called `name` in errors; else as `read_model`."""
    if options is not None:
        values = _converted(values, name, options)
    family = str(values.get("model_type", "")).removeprefix("lamella_")
    if family not in FAMILIES:
        raise UserError(f"model_type {family!r} cannot be trained{did_you_mean(family, FAMILIES)}")
    D, F, N, layers = (_needed(values, key, name) for key in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"
    ))  # fmt: skip
    moe = None if values.get("moe") is None else MoEConfig.from_dict(values["moe"])
    heads = values.get("attention_moe")
    return Model(
        family=family,
        D=D,
        F=F,
        num_layers=layers,
        N=N,
        G=values.get("num_key_value_heads") or N,
        H=values.get("head_dim") or D // N,
        V=_needed(values, "vocab_size", name),
        tied=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
        max_positions=values.get("max_position_embeddings", 1 << 30),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch."),
        moe=moe,
        attention_moe=None if heads is None else AttentionMoEConfig.from_dict(heads),
    )


def _needed(values: Json, key: str, name: str) -> int:
    if not isinstance(values.get(key), int):
        raise UserError(f"{name} does not say {key}, which a plan needs; add it")
    return values[key]


def _converted(values: Json, name: str, options: MethodOptions) -> Json:
    """The config.json with the entry that a conversion adds."""
    if values.get(options.entry) is not None:
        raise UserError(f"{name} is a converted model already; leave --dense out, and name it as model=FOLDER")
    return values | {options.entry: sizes_of(options, values).to_dict()}
