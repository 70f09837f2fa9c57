"""Where a family's decoder layer keeps its FFN: the whole difference between families for calibration.

Every layer here is pre-norm, residual + FFN(norm(residual)), so the gradient of the FFN's output is that of the
layer's output.

Shapes: D model width, F FFN neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lamella.errors import UserError
from lamella.partition.layer import FFN


@dataclass(frozen=True)
class Anatomy:
    """Names of modules, relative to the decoder or to its layer, and of keys in the config."""

    up: str
    """Its input is x."""
    down: str
    """Its input is h, its output is the FFN's."""
    gate: str | None = None
    layers: str = "layers"
    final_norm: str = "norm"
    activation: str = "hidden_act"
    """Key in the config."""
    transposed: bool = False
    """Matrices are stored [in, out] (transformers' Conv1D)."""
    masks_documents: bool = True
    """The model itself keeps documents apart by their positions; else it is given a mask."""


_LLAMA = Anatomy(up="mlp.up_proj", down="mlp.down_proj", gate="mlp.gate_proj")
# model_type of the config -> where things are
ANATOMIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Anatomy(
        up="mlp.c_fc", down="mlp.c_proj", layers="h", final_norm="ln_f", activation="activation_function",
        transposed=True,
    ),
    "opt": Anatomy(
        up="fc1", down="fc2", final_norm="final_layer_norm", activation="activation_function", masks_documents=False
    ),
}  # fmt: skip


def anatomy_of(config: dict[str, Any]) -> Anatomy:
    """The family's anatomy; UserError for an unknown family and for OPT's post-norm variant."""
    family = str(config.get("model_type"))
    if family not in ANATOMIES:
        raise UserError(f"{family!r} models cannot be calibrated; known families: {', '.join(ANATOMIES)}")
    if not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm"):
        raise UserError("this OPT normalises after its layers (as OPT-350m does); only pre-norm models are known")
    return ANATOMIES[family]


def ffn_of(layer: nn.Module, anatomy: Anatomy, activation: str) -> FFN:
    """The FFN's matrices, views of the layer's weights."""
    up, down = layer.get_submodule(anatomy.up), layer.get_submodule(anatomy.down)
    gate_FD = None if anatomy.gate is None else _matrix(layer.get_submodule(anatomy.gate), anatomy)
    return FFN(gate_FD, _matrix(up, anatomy), _matrix(down, anatomy), _bias(up), _bias(down), activation)


def _matrix(module: Any, anatomy: Anatomy) -> Tensor:
    weight = module.weight.detach()
    return weight.T if anatomy.transposed else weight


def _bias(module: Any) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return None if bias is None else bias.detach()
