"""What calibration knows of a family: where the decoder keeps its parts, and the FFN inside a layer.

Where a layer's output is residual + FFN, the gradient of the FFN's output is that of the layer's output, and another
FFN's output can be added to the residual; where layers end with a norm (OPT's post-norm), that norm is taken to begin
the next layer. Where a norm or a factor stands between FFN and sum, the layer itself is run for both.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lamella.architecture.layout import FFNLayout, ffn_layout
from lamella.architecture.model import sizes_of
from lamella.architecture.types import Modules
from lamella.calibrate.sample import FFN
from lamella.checkpoint.tensors import SourceTensor
from lamella.jsons import Json


@dataclass(frozen=True)
class Anatomy:
    """Names of the decoder's modules."""

    modules: Modules
    post_norm: str | None = None
    """The norm that a layer ends with."""
    plain_residual: bool = True
    """A layer's output is the residual + the FFN's output."""


def anatomy_of(config: Json) -> Anatomy:
    """The family's anatomy, a converted model's too; UserError for an unknown one."""
    sizes = sizes_of(config)
    modules = sizes.family.modules
    post_norm = not sizes.values.get("do_layer_norm_before", True)  # of OPT alone: OPT-350m
    return Anatomy(modules, modules.final_norm if post_norm else None, sizes.family.plain_residual)


class LayerFFN:
    """The FFN of one decoder layer: where its weights and modules are."""

    def __init__(self, config: Json, index: int, prefix: str):
        """`prefix`: of the layer's tensors in the checkpoint."""
        self._layout, self._prefix = ffn_layout(config), prefix
        self._names = {part: name.removeprefix(prefix) for part, name in self._layout.names(index).items()}

    def up(self, layer: nn.Module) -> nn.Module:
        """The module that is given x."""
        name = self._names.get("gate_up") or self._names["up"]
        return layer.get_submodule(name.removesuffix(".weight"))

    def down(self, layer: nn.Module) -> nn.Module:
        """The module that is given h; its output is the FFN's."""
        return layer.get_submodule(self._names["down"].removesuffix(".weight"))

    def weights(self, layer: nn.Module) -> FFN:
        """Views of the layer's weights."""
        return ffn_of(self._layout, {part: layer.get_parameter(name).detach() for part, name in self._names.items()})

    def read(self, tensors: dict[str, SourceTensor]) -> FFN:
        """The same out of the checkpoint, float32."""
        parts = {part: read_whole(tensors[self._prefix + name]) for part, name in self._names.items()}
        return ffn_of(self._layout, parts)


def ffn_of(layout: FFNLayout, parts: dict[str, Tensor]) -> FFN:
    """The FFN whose tensors these are, by the parts of `FFNLayout.names`; views of them."""
    if "gate_up" in parts:
        gate, up = parts["gate_up"].chunk(2)
        parts = parts | {"gate": gate, "up": up}
    if layout.transposed:
        parts = parts | {part: parts[part].T for part in ("up", "down")}
    return FFN(
        parts.get("gate"), parts["up"], parts["down"], parts.get("up_bias"), parts.get("down_bias"), layout.activation
    )


def read_whole(tensor: SourceTensor) -> Tensor:
    """A tensor of the checkpoint, float32."""
    return tensor.read(0, tensor.numel).view(tensor.shape).float()
