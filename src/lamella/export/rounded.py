"""Lamella's own form with frozen experts in int8 or int4: fewer bytes on disk and in memory, for text and evaluation.

All else is copied. Numbers and scales are those of `lamella.moe.matrices`, in two tensors per packed tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.architecture.converted import converted_family
from lamella.architecture.moe_tensors import is_frozen, scales_name
from lamella.checkpoint.pieces import Piece, Sink, Stretches
from lamella.checkpoint.plan import MAX_SHARD_BYTES, OutputTensor, WritePlan
from lamella.checkpoint.tensors import CHUNK_ELEMENTS, SourceTensor, spans
from lamella.checkpoint.write import write_json, write_tensors
from lamella.conversion.sidecars import write_remote_code
from lamella.errors import UserError
from lamella.export.model import ConvertedModel
from lamella.export.target import Options
from lamella.moe.matrices import ROUNDED_DTYPES, RoundedDtype, rounded, rounded_shapes

if TYPE_CHECKING:
    import torch

CODES = ({"int8": "I8", "int4": "U8"}, {"int8": "BF16", "int4": "BF16"})
"""safetensors' codes of numbers and of scales."""


def needs(model: ConvertedModel) -> list[str]:
    """What this model has that cannot be rounded."""
    moe = model.ffn
    if moe is None or not any(moe.for_layer(layer).num_frozen_experts for layer in moe.moe_layers):
        return ["it rounds frozen experts, which this model has not"]
    if not moe.gated:
        return [f"it rounds gated experts, those of {model.family.name} have two matrices"]
    return ["it has no low-rank deltas beside rounded experts, this model has some"] if moe.lora_rank else []


def plan(model: ConvertedModel, options: Options) -> WritePlan:
    """The tensors and the config of a model that can be rounded."""
    dtype = next((name for name in ROUNDED_DTYPES if name.upper() == options.dtype), None)
    if dtype is None:
        raise UserError("--to lamella writes frozen experts in fewer bits; say in how many: --dtype int8 or int4")
    if options.tokenizer is not None:
        raise UserError("--tokenizer is for --to gguf; other targets keep the model's own")
    tensors: list[OutputTensor] = []
    for name, source in model.tensors.items():
        if is_frozen(name):
            tensors += _rounded_tensors(name, source, dtype)
        else:
            tensors.append(OutputTensor(name, source.dtype, source.shape, Stretches.copy(source)))
    moe = dataclasses.replace(model.moe, frozen_dtype=dtype)
    tricks = ["the frozen experts are rounded, and all else is as it was"]
    shard = options.max_shard_bytes or MAX_SHARD_BYTES
    return WritePlan(tensors, model.config | {"moe": moe.to_dict()}, shard, notes={"tricks": tricks})


def write(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Safetensors, config.json, and the file that names the package to transformers."""
    write_tensors(plan, folder, on_bytes)
    write_json(folder / "config.json", plan.config)
    write_remote_code(folder, converted_family(plan.config))


def _rounded_tensors(name: str, source: SourceTensor, dtype: RoundedDtype) -> list[OutputTensor]:
    return [
        OutputTensor(own, CODES[which][dtype], shape, Rounded(source, dtype, which))
        for which, (own, (_, shape)) in enumerate(
            zip((name, scales_name(name)), rounded_shapes(source.shape, dtype), strict=True)
        )
    ]


@dataclass(frozen=True)
class Rounded(Piece):
    """The numbers (0) or the scales (1) that [E, N, K] weights are rounded to."""

    source: SourceTensor
    dtype: RoundedDtype
    which: int

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        """Some rows at a time."""
        *rows, K = self.source.shape
        for row, count in spans(0, math.prod(rows), max(1, CHUNK_ELEMENTS // K)):
            weight_rK = self.source.read(row * K, count * K).view(count, K)
            if not weight_rK.isfinite().all():
                raise UserError(f"{self.source.name} holds NaN or infinite values; the checkpoint is damaged")
            sink.append(rounded(weight_rK, self.dtype)[self.which].to(dtype).flatten())
