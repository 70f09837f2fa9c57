"""Where each family's layers keep their FFN, and what it computes: all that conversion has to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lamella.architecture.moe import Activation
from lamella.architecture.two_matrix import activation_of, gpt2_ffn_width

CONVERTED_PREFIX = "lamella_"


@dataclass(frozen=True)
class FFNLayout:
    """Where a dense model's layers keep their FFN, and what it computes. Names are templates: {} is the layer."""

    block: str
    """Prefix of the tensors of the MoE layer that takes the FFN's place."""
    up: str
    down: str
    gate: str | None
    """None: two matrices, y = down act(up x + up_bias) + down_bias."""
    up_bias: str | None
    down_bias: str | None
    transposed: bool
    """Matrices are stored [in, out]; else [out, in]."""
    activation: Activation
    hidden_size: int
    """D"""
    ffn_width: int
    """F"""
    num_layers: int

    def names(self, layer: int) -> dict[str, str]:
        """Part -> name of the dense tensor, of the parts that there are: gate, up, up_bias, down, down_bias."""
        parts = ("gate", "up", "up_bias", "down", "down_bias")
        return {part: name.format(layer) for part in parts if (name := getattr(self, part))}

    def prefix(self, layer: int) -> str:
        """Of the MoE layer's tensors."""
        return self.block.format(layer)


def ffn_layout(config: dict[str, Any]) -> FFNLayout:
    """The layout of a checkpoint with this config.json, dense or converted, whose family is known."""
    family = config["model_type"].removeprefix(CONVERTED_PREFIX)
    if family == "gpt2":
        mlp, D = "transformer.h.{}.mlp.", config["n_embd"]
        return FFNLayout(
            mlp, f"{mlp}c_fc.weight", f"{mlp}c_proj.weight", None, f"{mlp}c_fc.bias", f"{mlp}c_proj.bias", True,
            activation_of(config), D, gpt2_ffn_width(config), config["n_layer"],
        )  # fmt: skip
    D, layers = config["hidden_size"], config["num_hidden_layers"]
    if family == "opt":
        # transformers' layer calls fc1, the activation and fc2 itself: the MoE layer stands in fc1's place
        fc1, fc2 = "model.decoder.layers.{}.fc1.", "model.decoder.layers.{}.fc2."
        return FFNLayout(
            fc1, f"{fc1}weight", f"{fc2}weight", None, f"{fc1}bias", f"{fc2}bias", False,
            activation_of(config), D, config["ffn_dim"], layers,
        )  # fmt: skip
    mlp = "model.layers.{}.mlp."
    return FFNLayout(
        mlp, f"{mlp}up_proj.weight", f"{mlp}down_proj.weight", f"{mlp}gate_proj.weight", None, None, False,
        "silu", D, config["intermediate_size"], layers,
    )  # fmt: skip
