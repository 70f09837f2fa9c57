"""Dense models in GGUF files: dequantised to float32 a few rows at a time.

Config and tokenizer go through transformers. Weights are renamed here, and llama's query and key rows put back in
order: GGUF holds each head's rows interleaved (i, i + d/2 -> 2i, 2i + 1) for llama.cpp's kind of rope.

Memory: the weights cost a few MiB, the `gguf` reader's index of a large vocabulary a few hundred.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lamella.architecture.families import family_of, sizes_of
from lamella.architecture.rows import FAMILIES
from lamella.architecture.types import Family, GGUFNames
from lamella.checkpoint.check import check_dense, read_config
from lamella.checkpoint.tensors import SourceTensor, read_bytes
from lamella.errors import UserError
from lamella.jsons import Json

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor


@dataclass(frozen=True)
class GgufTensor(SourceTensor):
    """A quantised tensor; rows are dequantised as they are read."""

    kind: GGMLQuantizationType
    heads: int = 0
    """Not 0: rows of this many heads are interleaved."""

    def read(self, start: int, count: int) -> Tensor:
        """As SourceTensor.read, float32. Quantised blocks lie within a row, so whole rows are read."""
        unit = self.numel // self.heads if self.heads else self.width
        first, last = start // unit, -(-(start + count) // unit)
        values = self._dequantised(first * unit // self.width, last * unit // self.width)
        if self.heads:
            head_dim, width = unit // self.width, self.width
            values = values.reshape(last - first, head_dim // 2, 2, width).swapaxes(1, 2)
        flat = np.ascontiguousarray(values).reshape(-1)
        return torch.from_numpy(flat[start - first * unit :][:count])

    def _dequantised(self, first_row: int, last_row: int) -> np.ndarray:
        from gguf import GGML_QUANT_SIZES, dequantize

        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        row_bytes = self.width // block * block_bytes
        raw = read_bytes(self.path, self.begin + first_row * row_bytes, (last_row - first_row) * row_bytes)
        return dequantize(raw.reshape(last_row - first_row, row_bytes), self.kind)


class GgufModel(NamedTuple):
    """A dense model of float32 tensors in a .gguf file; the fields are those of `lamella.checkpoint.source.Checkpoint`
    behind its name."""

    family: Family
    config: Json
    tensors: dict[str, SourceTensor]
    licence: str | None
    copy_sidecars: Callable[[Path], None]


def open_gguf(path: Path) -> GgufModel:
    """The model of a .gguf file; UserError if it cannot be converted."""
    if not path.is_file():
        raise UserError(f"no such model: {path} does not exist")
    reader = _reader(path)
    architecture = _text(reader, "general.architecture")
    if architecture in FAMILIES and FAMILIES[architecture].gguf is None:
        raise UserError(f"{path.name} is {architecture}, which is not read from GGUF; convert the model's safetensors")
    _refuse_rope_scaling(reader, path, architecture)
    with tempfile.TemporaryDirectory() as folder:
        _save_config(path, Path(folder), reader, architecture)
        config = read_config(Path(folder))
    family = family_of(config)
    names, sizes = _names(family, path), sizes_of(config)
    heads = (sizes.N, sizes.G) if names.interleaved else (0, 0)
    tensors: dict[str, SourceTensor] = {
        tensor.name: tensor for entry in reader.tensors if (tensor := _tensor(entry, path, names, heads))
    }
    check_dense(tensors, config, family, path.name)
    _check_kinds(tensors, path)
    return GgufModel(family, config, tensors, _text(reader, "general.license"), lambda out: _save_sidecars(path, out))


def _names(family: Family, path: Path) -> GGUFNames:
    if family.gguf is None:
        raise UserError(f"{path.name} is {family.name}, which is not read from GGUF; convert the model's safetensors")
    return family.gguf


def _reader(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # what it raises on truncated or foreign files
        raise UserError(f"{path} is truncated or not a GGUF file ({error}); download it again") from None


def _check_kinds(tensors: dict[str, SourceTensor], path: Path) -> None:
    """Dequantise a row of each kind of quantisation."""
    for kind, tensor in {tensor.kind: tensor for tensor in tensors.values() if isinstance(tensor, GgufTensor)}.items():
        try:
            tensor.read(0, 1)
        except NotImplementedError:
            raise UserError(
                f"{path.name} holds {kind.name} weights, which the gguf package cannot dequantise"
            ) from None


def _text(reader: GGUFReader, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else str(field.contents())


def _refuse_rope_scaling(reader: GGUFReader, path: Path, architecture: str | None) -> None:
    """transformers reads no rope scaling from a GGUF file; the model would be another one beyond short texts."""
    scaling = _text(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none") or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise UserError(
            f"{path.name} scales its rope, which is not read from GGUF; convert the model's safetensors instead"
        )


def _tensor(entry: ReaderTensor, path: Path, names: GGUFNames, heads: tuple[int, int]) -> GgufTensor:
    stem, _, suffix = entry.name.rpartition(".")
    name, interleaved = f"{names.top.get(stem, stem)}.{suffix}", 0
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        name = f"model.layers.{match[1]}.{names.in_layer.get(match[2], match[2])}.{suffix}"
        interleaved = {"attn_q": heads[0], "attn_k": heads[1]}.get(match[2], 0)
    shape = tuple(int(n) for n in reversed(entry.shape))
    begin = int(entry.data_offset)
    if begin + int(entry.n_bytes) > path.stat().st_size:
        raise UserError(f"{path} is truncated within {entry.name}; download it again")
    return GgufTensor(name, "F32", shape, path, begin, entry.tensor_type, interleaved)


def _save_config(path: Path, folder: Path, reader: GGUFReader, architecture: str | None) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{path.name} cannot be read: {str(error).strip().splitlines()[0]}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # dequantised here
    config.architectures, config.dtype = None, "float32"
    # Not read by transformers for every family, which then takes the family's default.
    if head_dim := _text(reader, f"{architecture}.attention.key_length"):
        config.head_dim = int(head_dim)
    config.save_pretrained(folder)


def _save_sidecars(path: Path, out: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    reader = _reader(path)
    if reader.get_field("tokenizer.ggml.model") is not None:
        AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(out)
    ids = {f"{kind}_token_id": reader.get_field(f"tokenizer.ggml.{name}_token_id") for kind, name in _SPECIAL.items()}
    GenerationConfig(**{key: int(field.contents()) for key, field in ids.items() if field is not None}).save_pretrained(
        out
    )


_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}
