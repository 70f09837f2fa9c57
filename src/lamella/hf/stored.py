"""The experts of a converted model as its file holds them: in the model's dtype, or rounded with scales beside them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lamella.architecture.converted import stored_ffn_config
from lamella.architecture.layout import layout_of
from lamella.architecture.model import sizes_of
from lamella.architecture.moe import MoEConfig
from lamella.architecture.moe_tensors import DOWN, GATE_UP, KINDS, Kind, expert_name, expert_shapes, scales_name
from lamella.checkpoint.dtypes import DTYPES
from lamella.checkpoint.source import read_config, read_folder
from lamella.checkpoint.tensors import ITEM_BYTES, SourceTensor
from lamella.errors import UserError
from lamella.hf.blocks import ExpertsElsewhere, MoELayer, decoder_layers
from lamella.moe.matrices import (
    Matrix,
    PackedDtype,
    dequantised,
    packed_matrix,
    rounded_matrix,
    rounded_shapes,
)
from lamella.moe.offload.slots import Key, Range
from lamella.moe.packed import Experts
from lamella.moe.quantised import Beside, Quantised


class StoredMatrix(NamedTuple):
    """A matrix [N, K] of one expert; nothing is read until it is asked for."""

    values: SourceTensor
    """[N, K], or rounded numbers as `lamella.moe.matrices` has them."""
    scales: SourceTensor | None
    """Of rounded numbers."""
    shape: tuple[int, int]

    def weight(self) -> Tensor:
        """As stored; of rounded numbers the float32 that they stand for."""
        values = _read(self.values)
        return values if self.scales is None else dequantised(values, _read(self.scales), self.shape[1])

    def packed(self, dtype: PackedDtype, device: torch.device) -> Matrix:
        """Rounded to the dtype, or as it is where it is rounded already."""
        if self.scales is None:
            return packed_matrix(self.weight().to(device), dtype)
        return rounded_matrix(_read(self.values).to(device), _read(self.scales).to(device), self.shape[1])

    def range(self) -> Range:
        """Where its bytes are."""
        scales = None if self.scales is None else _range(self.scales)
        return _range(self.values)._replace(scales=scales, width=self.shape[1])


Places = dict[Key, tuple[StoredMatrix, StoredMatrix]]
"""For each (layer, expert) its matrices gate_up and down."""


def stored_experts(folder: Path, moe: MoEConfig) -> Places:
    """Of a converted folder with gated experts.

    Raises:
        UserError: tensors that are not those of the config.
    """
    config = read_config(folder)
    tensors, sizes = read_folder(folder), sizes_of(config)
    places: Places = {}
    for layer in moe.moe_layers:
        own, first = moe.for_layer(layer), 0
        shapes = expert_shapes(sizes.D, own.moe_intermediate_size, gated=True)
        for kind, count in zip(KINDS, (own.num_frozen_experts, own.num_trainable_experts), strict=True):
            prefix = layout_of(sizes).prefix(layer)
            parts = []
            for part in (GATE_UP, DOWN):
                parts.append(
                    _packed(folder, tensors, prefix + expert_name(kind, part), (count, *shapes[part]), kind, own)
                )
            for i in range(count):
                gate_up, down = (_matrix(values, scales, i, shape) for values, scales, shape in parts)
                places[layer, first + i] = gate_up, down
            first += count
    return places


def give_stored_experts(model: PreTrainedModel, folder: Path) -> None:
    """Give a model that was made without experts those of its folder, the frozen ones rounded as they are stored."""
    moe = MoEConfig.from_dict(model.config.moe)
    assert moe.frozen_dtype != "model"
    places, layers = stored_experts(folder, moe), decoder_layers(model)
    for layer in moe.moe_layers:
        block, own = layers[layer].mlp, moe.for_layer(layer)
        assert isinstance(block, MoELayer)
        assert isinstance(block.experts, ExpertsElsewhere)
        experts = [places[layer, e] for e in range(own.num_experts)]
        frozen, trainable = experts[: own.num_frozen_experts], experts[own.num_frozen_experts :]
        slices = Quantised(*([pair[i].packed(moe.frozen_dtype, model.device) for pair in frozen] for i in (0, 1)))
        block.experts.given = Beside(slices, _as_they_are(trainable, frozen[0], model))


def rounded_in_file(folder: str | Path) -> bool:
    """Whether this is a converted folder whose frozen experts are rounded; False for hub names."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        return False
    config = read_config(path)
    moe = stored_ffn_config(config) if isinstance(config.get("moe"), dict) and "frozen_dtype" in config["moe"] else None
    return moe is not None and moe.frozen_dtype != "model"


def _as_they_are(
    pairs: list[tuple[StoredMatrix, StoredMatrix]], like: tuple[StoredMatrix, StoredMatrix], model: PreTrainedModel
) -> Experts:
    def packed(i: int) -> Tensor:
        if not pairs:
            return torch.empty(0, *like[i].shape, dtype=model.dtype, device=model.device)
        return torch.stack([pair[i].weight() for pair in pairs]).to(model.device, model.dtype)

    return Experts(packed(0), packed(1))


def _packed(
    folder: Path, tensors: dict[str, SourceTensor], name: str, shape: tuple[int, ...], kind: Kind, moe: MoEConfig
) -> tuple[SourceTensor | None, SourceTensor | None, tuple[int, int]]:
    """(all experts of a kind in a layer, their scales, the shape of one)."""
    E, N, K = shape
    if not E:
        return None, None, (N, K)
    rounded_to = None if kind == "trainable" or moe.frozen_dtype == "model" else moe.frozen_dtype
    names = [name] if rounded_to is None else [name, scales_name(name)]
    if missing := [n for n in names if n not in tensors]:
        raise UserError(f"{folder} lacks {missing[0]}; write it again")
    values, *scales = (tensors[n] for n in names)
    if rounded_to is None:
        fits = values.shape == shape and values.dtype in ITEM_BYTES
    else:
        found = [(DTYPES.get(t.dtype), t.shape) for t in (values, *scales)]
        fits = found == rounded_shapes(shape, rounded_to)
    if not fits:
        raise UserError(f"{folder}: {name} is not as config.json says; write it again")
    return values, scales[0] if scales else None, (N, K)


def _matrix(
    values: SourceTensor | None, scales: SourceTensor | None, index: int, shape: tuple[int, int]
) -> StoredMatrix:
    assert values is not None
    return StoredMatrix(_part(values, index), None if scales is None else _part(scales, index), shape)


def _part(tensor: SourceTensor, index: int) -> SourceTensor:
    """One matrix of a packed tensor."""
    shape = tensor.shape[1:]
    nbytes = math.prod(shape) * DTYPES[tensor.dtype].itemsize
    return dataclasses.replace(tensor, shape=shape, begin=tensor.begin + index * nbytes)


def _range(tensor: SourceTensor) -> Range:
    assert isinstance(tensor.path, Path)  # of a local folder
    return Range(tensor.path, tensor.begin, tensor.shape, DTYPES[tensor.dtype])


def _read(tensor: SourceTensor) -> Tensor:
    return tensor.read(0, tensor.numel).view(tensor.shape)
