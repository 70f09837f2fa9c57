"""Where a model's layers keep their FFN, and what it computes: all that conversion has to know of it."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.architecture.model import sizes_of
from lamella.architecture.moe import Activation
from lamella.architecture.two_matrix import check_activation
from lamella.architecture.types import FFNNames, Sizes
from lamella.jsons import Json

PARTS = ("gate_up", "gate", "up", "up_bias", "down", "down_bias")


@dataclass(frozen=True)
class FFNLayout:
    """Where a dense model's layers keep their FFN, and what it computes."""

    ffn: FFNNames
    activation: Activation
    hidden_size: int
    """D"""
    ffn_width: int
    """F"""
    num_layers: int

    @property
    def gated(self) -> bool:
        return self.ffn.gated

    @property
    def output_bias(self) -> bool:
        """The FFN adds a bias to its output."""
        return self.ffn.down_bias is not None

    @property
    def transposed(self) -> bool:
        """Matrices are stored [in, out]; else [out, in]."""
        return self.ffn.transposed

    def names(self, layer: int) -> dict[str, str]:
        """Part -> name of the dense tensor, of the `PARTS` that there are."""
        return {part: name.format(layer) for part in PARTS if (name := getattr(self.ffn, part))}

    def prefix(self, layer: int) -> str:
        """Of the MoE layer's tensors."""
        return self.ffn.block.format(layer)


def ffn_layout(config: Json) -> FFNLayout:
    """The layout of a checkpoint with this config.json, dense or converted."""
    return layout_of(sizes_of(config))


def layout_of(sizes: Sizes) -> FFNLayout:
    return FFNLayout(sizes.family.ffn, check_activation(sizes), sizes.D, sizes.F, sizes.num_layers)
