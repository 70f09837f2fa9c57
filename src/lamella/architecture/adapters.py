"""The `adapters` entry of a model's config.json: low-rank adapters as experts of a dense model. Imports no torch.

Each of the named layers keeps its dense FFN, and beside it N adapters (LoRA, arXiv 2106.09685) and a router. Expert i
is the dense FFN with adapter i on its matrices; expert N, the zero expert, is the dense FFN itself.

Shapes: D model width, F FFN width, N adapters, E = N + 1 experts, r rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lamella.architecture.gated import Shapes
from lamella.errors import UserError
from lamella.jsons import Json

FFN_MODULES = ("gate_proj", "up_proj", "down_proj")
ADAPTERS_IN_HF = "model.layers.{}.mlp."
ROUTER, SELECTION_BIAS = "router.weight", "router.selection_bias"
RANK_MULTIPLE = 8
"""Ranks are filled up with zeros to a multiple of this: grouped products of bfloat16 want rows of 16 bytes."""
ZERO_BIAS = 1.0
"""Added to the zero expert's probability, this sends every token there: the dense model, whatever the router says."""


@dataclass(frozen=True)
class AdaptersConfig:
    """The entry, as config.json has it."""

    names: tuple[str, ...]
    """Of the adapters, in the order of the experts."""
    layers: tuple[int, ...]
    """Layers with adapters, ascending; the others are dense."""
    rank: int
    """r of every stored matrix; smaller adapters are filled up with zeros."""
    num_experts_per_tok: int = 1
    """1: the token is computed by the likeliest expert. More: by the likeliest ones, weighed by their probabilities
    over their sum."""
    gate: str = "softmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.names or not self.layers or self.rank < 1:
            raise UserError(
                "the entry adapters of config.json names no adapter, layer or rank; convert the model again"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"top_k is {self.num_experts_per_tok}; it must be 1 to {self.num_experts}, the adapters and the zero "
                "expert"
            )
        if self.gate != "softmax":
            raise UserError(f"the gate of adapters is {self.gate!r}; it must be softmax")

    @property
    def num_experts(self) -> int:
        """E: the adapters and the zero expert, which is the last."""
        return len(self.names) + 1

    @classmethod
    def from_dict(cls, values: Json) -> AdaptersConfig:
        """Read the entry; UserError for unknown or missing keys."""
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"the entry adapters of config.json is not one of lamella's ({error})") from None

    def to_dict(self) -> Json:
        return dataclasses.asdict(self) | {"names": list(self.names), "layers": list(self.layers)}


def lora_tensor(module: str, half: str) -> str:
    """The stored low-rank matrices "a" or "b" of a module, within the layer."""
    return f"adapters.{module}_{half}"


def adapter_shapes(D: int, F: int, config: AdaptersConfig) -> Shapes:
    """The tensors that a layer has beside its dense FFN: a [N, r, in] and b [N, out, r] of each module, the router."""
    N, r, widths = len(config.names), config.rank, {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}
    shapes: Shapes = {ROUTER: (N + 1, D), SELECTION_BIAS: (N + 1,)}
    for module, (width_in, width_out) in widths.items():
        shapes[lora_tensor(module, "a")] = (N, r, width_in)
        shapes[lora_tensor(module, "b")] = (N, width_out, r)
    return shapes


def adapters_config(config: Json) -> AdaptersConfig | None:
    """The `adapters` entry of a config.json; None where there is none."""
    return None if config.get("adapters") is None else AdaptersConfig.from_dict(config["adapters"])
