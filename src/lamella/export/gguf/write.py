"""One GGUF file, a tensor at a time: memory is the largest tensor, an expert matrix of all experts of a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamella.checkpoint.dtypes import DTYPES as TORCH_DTYPES
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.errors import UserError

if TYPE_CHECKING:
    import gguf

# Name -> llama.cpp's number of the file type; what the gguf package can quantise to, of use here.
DTYPES = {"F32": 0, "F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
_OWN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Routing decides by small differences; llama.cpp's own tool keeps these as they are, too.
_ALWAYS_F32 = ("ffn_gate_inp.weight", "exp_probs_b.bias", "rope_freqs.weight")


class Typed(NamedTuple):
    """A metadata value whose GGUF type is not the usual one of its Python type."""

    value: Any
    kind: gguf.GGUFValueType
    items: gguf.GGUFValueType | None = None


@dataclass
class _Memory:
    """A sink that keeps a tensor's elements."""

    parts: list[Tensor] = field(default_factory=list)

    def append(self, data: Tensor) -> None:
        self.parts.append(data)

    def place(self, start: int, data: Tensor) -> None:
        raise NotImplementedError("no piece of a GGUF file is written out of order")


def own_dtype(dtype: torch.dtype) -> str:
    """The GGUF dtype that changes nothing."""
    return _OWN[dtype]


def write_gguf(plan: WritePlan, folder: Path, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write `plan.notes["file"]` into the folder, its matrices as `plan.notes["dtype"]`."""
    import gguf

    metadata = dict(plan.config)
    writer = gguf.GGUFWriter(folder / plan.notes["file"], metadata.pop("general.architecture"))
    for key, value in metadata.items():
        _add_value(writer, key, value)
    if plan.notes["dtype"] in ("Q8_0", "Q4_0"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    kinds = {tensor.name: _kind(tensor, plan.notes["dtype"]) for tensor in plan.tensors}
    for tensor in plan.tensors:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[tensor.name])
        nbytes = int(np.prod(shape))
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), nbytes, kinds[tensor.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan.tensors:
        encoded = gguf.quantize(_values(tensor), kinds[tensor.name])
        writer.write_tensor_data(encoded.view(np.uint8))
        on_bytes(encoded.nbytes)
    writer.close()


def _kind(tensor: OutputTensor, dtype: str) -> gguf.GGMLQuantizationType:
    """Vectors and what routes stay fp32, and so do matrices whose rows are no whole number of blocks."""
    import gguf

    wanted = gguf.GGMLQuantizationType[dtype]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    if len(tensor.shape) < 2 or tensor.name.endswith(_ALWAYS_F32) or tensor.shape[-1] % block:
        return gguf.GGMLQuantizationType.F32
    return wanted


def _values(tensor: OutputTensor) -> np.ndarray:
    """The tensor as its piece makes it, float32."""
    memory = _Memory()
    tensor.piece.write(memory, TORCH_DTYPES[tensor.dtype])
    values = torch.cat([part.flatten().float() for part in memory.parts]).numpy()
    if values.size != tensor.numel or not np.isfinite(values).all():
        raise UserError(f"{tensor.name} is not whole or holds NaN or infinite values; the checkpoint is damaged")
    return values.reshape(tensor.shape)


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    from gguf import GGUFValueType

    if isinstance(value, Typed):
        writer.add_key_value(key, value.value, value.kind, value.items)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value and isinstance(value[0], int) and not isinstance(value[0], bool):
        writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.INT32)
    else:
        writer.add_array(key, value)
