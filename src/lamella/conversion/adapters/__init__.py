"""Adapters as experts of a dense model: every dense tensor is copied as it is, adapters and routers stand beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from lamella.architecture.adapters import (
    ADAPTERS_IN_HF,
    ROUTER,
    SELECTION_BIAS,
    ZERO_BIAS,
    AdaptersConfig,
    adapter_shapes,
    lora_tensor,
    widths_of,
)
from lamella.architecture.converted import converted_config
from lamella.architecture.families import sizes_of
from lamella.architecture.gated import Shapes
from lamella.architecture.layout import ffn_layout
from lamella.architecture.peft import PeftAdapter, Place
from lamella.checkpoint.pieces import Piece, Sink, Values, checked
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import ITEM_BYTES, read_header
from lamella.conversion.plan import ConversionPlan
from lamella.conversion.replace import stored_dtype, with_ffns_replaced
from lamella.errors import UserError
from lamella.recipe.methods.adapters import AdaptersOptions, adapters_sizes, read_adapters


def plan_adapters(model: str | Path | None, options: AdaptersOptions) -> ConversionPlan:
    """All tensors and the config of a model whose experts are adapters. UserError where the two do not fit."""
    source = Checkpoint.open(model)
    config, sizes = adapters_sizes(options, source.config), sizes_of(source.config)
    adapters = list(read_adapters(options, sizes).values())
    tensors = with_ffns_replaced(source, ffn_layout(source.config), (), lambda *_: [], options.dtype)
    for layer, block in product(config.layers, config.blocks):
        widths = widths_of(sizes)[block]
        dense = source.tensors[Place(layer, list(widths)[-1]).path + ".weight"]
        dtype = stored_dtype(dense.dtype, options.dtype)
        shapes = adapter_shapes(widths, config)
        pieces = _pieces(adapters, layer, config, list(widths), shapes)
        prefix = ADAPTERS_IN_HF[block].format(layer)
        tensors += [
            OutputTensor(prefix + name, "F32" if name == SELECTION_BIAS else dtype, shape, pieces[name])
            for name, shape in shapes.items()
        ]
    new = converted_config(source.config, source.family, options.dtype, moe=None, adapters=config.to_dict())
    return ConversionPlan(source, WritePlan(tensors, new))


def _pieces(
    adapters: list[PeftAdapter], layer: int, config: AdaptersConfig, modules: list[str], shapes: Shapes
) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {
        ROUTER: Values((0.0,), math.prod(shapes[ROUTER])),
        SELECTION_BIAS: Values((*(0.0 for _ in config.names), ZERO_BIAS)),
    }
    for module in modules:
        for half in ("a", "b"):
            name = lora_tensor(module, half)
            pieces[name] = Stacked(tuple(adapters), Place(layer, module), half, shapes[name][1:])
    return pieces


@dataclass(frozen=True)
class Stacked:
    """One half of the low-rank matrices of all adapters at a place: [N, r, in] or, with their scales, [N, out, r].

    What an adapter lacks, of the rank or altogether, is zero.
    """

    adapters: tuple[PeftAdapter, ...]
    place: Place
    half: str
    shape: tuple[int, ...]
    """Of one adapter's."""

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        """See `lamella.checkpoint.pieces.Piece`."""
        for adapter in self.adapters:
            whole = torch.zeros(self.shape)
            if self.place in adapter.ranks:
                part = read_low_rank(adapter, self.place, self.half)
                whole[: part.shape[0], : part.shape[1]] = part
            sink.append(checked(whole.to(dtype), whole, str(adapter.folder)).flatten())


def read_low_rank(adapter: PeftAdapter, place: Place, half: str) -> Tensor:
    """A [r, in] or, times the adapter's scale, B [out, r], in float32."""
    source = read_header(adapter.weights)[adapter.stored(place, half)]
    if source.dtype not in ITEM_BYTES:
        raise UserError(f"{adapter.weights} holds {source.dtype}, which is no dtype of an adapter; save it in float32")
    matrix = source.read(0, source.numel).view(source.shape).float()
    return matrix * adapter.scales[place] if half == "b" else matrix
