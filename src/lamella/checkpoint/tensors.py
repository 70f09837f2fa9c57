"""Tensors that stay in their file: the safetensors header, and reading a range of elements.

Format of a safetensors file: 8 bytes little-endian header length n, n bytes of JSON (name -> dtype, shape, data_offsets
relative to the end of the header), then the bytes of all tensors without gaps. torch is imported by the first `read`:
what only copies files does without.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from lamella.checkpoint.remote import AnyPath, RemotePath
from lamella.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# safetensors' code -> bytes of an element; what a dense model's weights come in.
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
STORED_BYTES = ITEM_BYTES | {"I8": 1, "U8": 1}
"""Those, and the numbers that weights are rounded to."""
CHUNK_ELEMENTS = 1 << 20
"""Elements handled at a time: 4 MiB in float32 stay in the cache, and memory does not depend on the model's size."""
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class SourceTensor:
    """A tensor in a safetensors file; nothing is read until `read`."""

    name: str
    dtype: str
    """safetensors' code, such as "BF16"."""
    shape: tuple[int, ...]
    path: AnyPath
    begin: int
    """Offset of the first byte in the file."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements per row; a tensor of one dimension is one row."""
        return self.shape[-1] if self.shape else 1

    def read(self, start: int, count: int) -> Tensor:
        """Elements start .. start+count of the flattened tensor, [count], in the file's dtype."""
        from lamella.checkpoint.dtypes import as_tensor

        size = STORED_BYTES[self.dtype]
        return as_tensor(read_bytes(self.path, self.begin + start * size, count * size), self.dtype)

    def xxh3_128(self) -> str:
        """Hash of the tensor's bytes, as the manifest has it."""
        digest = xxhash.xxh3_128()
        size = self.numel * STORED_BYTES[self.dtype]
        for begin, count in spans(self.begin, size, CHUNK_ELEMENTS):
            digest.update(read_bytes(self.path, begin, count).data)
        return digest.hexdigest()

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, count) of consecutive chunks that cover the tensor."""
        return spans(0, self.numel, CHUNK_ELEMENTS)


def spans(start: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, count) of consecutive pieces of at most `size`."""
    for at in range(start, start + count, size):
        yield at, min(size, start + count - at)


def read_bytes(path: AnyPath, begin: int, count: int) -> np.ndarray:
    """`count` bytes from offset `begin`; UserError if the file ends earlier."""
    if isinstance(path, RemotePath):
        found = path.read_range(begin, begin + count)
        if len(found) != count:
            raise UserError(f"{path} ends {count - len(found)} bytes early; it is truncated or changed")
        return np.frombuffer(found, np.uint8).copy()
    size = path.stat().st_size
    if begin + count > size:  # or a damaged header asks for memory that there is not
        raise UserError(f"{path} ends {begin + count - size} bytes early; it is truncated or changed while it was read")
    buffer = np.empty(count, np.uint8)
    view, done = buffer.data, 0
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        while done < count:
            got = file.readinto(view[done:])
            if not got:
                raise UserError(f"{path} ends {count - done} bytes early; it is truncated or changed while it was read")
            done += got
    return buffer


def read_header(path: AnyPath) -> dict[str, SourceTensor]:
    """All tensors of a safetensors file, after checking that the file's length is exactly what the header promises."""
    size = path.stat().st_size
    length = struct.unpack("<Q", read_bytes(path, 0, 8).tobytes())[0] if size >= 8 else 0
    if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
        raise UserError(
            f"{path} is truncated or not a safetensors file: {size} bytes, header length {length}; download it again"
        )
    try:
        header = json.loads(read_bytes(path, 8, length).tobytes())
        header.pop("__metadata__", None)
        entries = [(name, _entry(path, name, 8 + length, fields)) for name, fields in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} has a broken safetensors header ({error}); download it again") from None
    _check_layout(path, 8 + length, size, [entry for _, entry in entries])
    return {name: tensor for name, (tensor, _) in entries}


def _entry(path: AnyPath, name: str, data_start: int, fields: dict) -> tuple[SourceTensor, int]:
    """(tensor, offset of its end)."""
    shape, (begin, end) = tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end)):
        raise ValueError(f"the shape or place of {name} is no whole numbers")
    tensor = SourceTensor(name, str(fields["dtype"]), shape, path, data_start + begin)
    if tensor.dtype in STORED_BYTES and end - begin != tensor.numel * STORED_BYTES[tensor.dtype]:
        raise UserError(
            f"{path}: {name} has {end - begin} bytes, not those of {tensor.dtype} {list(shape)}; download it again"
        )
    return tensor, data_start + end


def _check_layout(path: AnyPath, data_start: int, size: int, entries: list[tuple[SourceTensor, int]]) -> None:
    at = data_start
    for tensor, end in sorted(entries, key=lambda entry: entry[1]):
        if tensor.begin != at and tensor.numel:
            raise UserError(f"{path}: {tensor.name} overlaps another tensor or follows a gap; the header is broken")
        at = end
    if at != size:
        kind = "truncated" if size < at else "longer than its header says"
        raise UserError(f"{path} is {kind}: {size} bytes where the header promises {at}; download it again")


def encode_header(entries: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a safetensors file that holds (name, dtype, shape) in this order, padded to 8 bytes."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape in entries:
        end = at + math.prod(shape) * STORED_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
