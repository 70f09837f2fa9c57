"""The `adapters` entry of a model's config.json: low-rank adapters as experts of a dense model. Imports no torch.

Each of the named layers keeps its dense FFN, its attention or both, and beside each of these blocks N adapters (LoRA,
arXiv 2106.09685) and a router. Expert i is the dense block with adapter i on its matrices; expert N, the zero expert,
is the dense block itself.

Shapes: D model width, F FFN width, N adapters, E = N + 1 experts, r rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lamella.architecture.gated import Shapes
from lamella.architecture.types import Sizes
from lamella.errors import UserError, check_choice
from lamella.jsons import Json

Block: TypeAlias = Literal["mlp", "attention"]
MODULES: dict[Block, tuple[str, ...]] = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""The matrices that adapters of a block change."""
IN_HF: dict[Block, str] = {"mlp": "model.layers.{}.mlp.", "attention": "model.layers.{}.self_attn."}
"""Of a layer's block, in transformers' names."""
ADAPTERS_IN_HF: dict[Block, str] = {"mlp": IN_HF["mlp"], "attention": IN_HF["attention"] + "lora."}
"""Of what a block with adapters has beside the dense tensors."""
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
    blocks: tuple[Block, ...] = ("mlp",)
    """What has adapters in each of these layers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.names or not self.layers or self.rank < 1:
            raise UserError(
                "the entry adapters of config.json names no adapter, layer or rank; convert the model again"
            )
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"top_k is {self.num_experts_per_tok}; it must be 1 to {self.num_experts}, the adapters and the zero "
                "expert"
            )
        for block in self.blocks:
            check_choice("a block with adapters", block, get_args(Block))
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
        lists = {name: list(getattr(self, name)) for name in ("names", "layers", "blocks")}
        return dataclasses.asdict(self) | lists


def lora_tensor(module: str, half: str) -> str:
    """The stored low-rank matrices "a" or "b" of a module, within the layer."""
    return f"adapters.{module}_{half}"


Widths: TypeAlias = dict[str, tuple[int, int]]
"""module -> (in, out)"""


def widths_of(sizes: Sizes) -> dict[Block, Widths]:
    """The widths of the matrices that adapters may change, by their block."""
    D, F, heads, shared = sizes.D, sizes.F, sizes.N * sizes.H, sizes.G * sizes.H
    widths = (((D, F), (D, F), (F, D)), ((D, heads), (D, shared), (D, shared), (heads, D)))
    return {
        block: dict(zip(modules, own, strict=True))
        for (block, modules), own in zip(MODULES.items(), widths, strict=True)
    }


def block_of(module: str) -> Block:
    """Where a module such as "gate_proj" is."""
    return next(block for block, modules in MODULES.items() if module in modules)


def adapter_shapes(widths: Widths, config: AdaptersConfig) -> Shapes:
    """What a block has beside its dense tensors: a [N, r, in] and b [N, out, r] of each module, the router."""
    N, r, D = len(config.names), config.rank, next(iter(widths.values()))[0]
    shapes: Shapes = {ROUTER: (N + 1, D), SELECTION_BIAS: (N + 1,)}
    for module, (width_in, width_out) in widths.items():
        shapes[lora_tensor(module, "a")] = (N, r, width_in)
        shapes[lora_tensor(module, "b")] = (N, width_out, r)
    return shapes


def adapters_config(config: Json) -> AdaptersConfig | None:
    """The `adapters` entry of a config.json; None where there is none."""
    return None if config.get("adapters") is None else AdaptersConfig.from_dict(config["adapters"])
