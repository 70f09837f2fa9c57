"""A shard: one file of token ids with the index of its documents, checked whenever it is read.

Little-endian, in this order (N tokens, D documents, C = ceil(N / 32,768) blocks):

    header     128 bytes: magic "LAMELLA\\0", uint32 version, uint32 bytes per token (2 or 4), uint64 vocabulary size,
               uint64 N, uint64 D, uint32 mask (1: there is one), uint32 tokens per block, the tokenizer's hash
               (32 characters), zeros
    tokens     N uint16 (uint32 where the vocabulary has more than 65,536 ids); numpy.memmap reads them at offset 128
    mask       N bytes, if there is one: 1 where the token is to be predicted
    starts     D uint64, ascending: where each document begins; a shard may begin within one
    blocks     C rows of 3 uint64: xxh3-64 of the block's tokens, of its mask (else 0), documents that begin before it

The manifest beside the shards holds xxh3-128 of everything but tokens and mask. The hashes of the blocks are in that,
so a reader verifies exactly the blocks that it reads: 64 KiB or two for a sample, whatever the size of the corpus.

Files are read, not mapped: a page that vanished under a map kills the process, a read that comes short is an error.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lamella.data.tokenizer import Tokens
from lamella.errors import BadData

MAGIC = b"LAMELLA\0"
VERSION = 1
BLOCK_TOKENS = 32768
_HEADER = struct.Struct("<8sIIQQQII32s")
_HEADER_BYTES = 128
_FLUSH_TOKENS = 16 * BLOCK_TOKENS


class Window(NamedTuple):
    """A stretch of a token stream: ids, where documents begin in it, and what is to be predicted (None: all)."""

    ids: np.ndarray
    starts: np.ndarray
    """int64, relative to the stretch."""
    learned: np.ndarray | None


@dataclass(frozen=True)
class Header:
    token_bytes: int
    vocab_size: int
    num_tokens: int
    num_documents: int
    has_mask: bool
    tokenizer_hash: str

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.token_bytes == 2 else "<u4")

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // BLOCK_TOKENS)

    @property
    def mask_at(self) -> int:
        return _HEADER_BYTES + self.num_tokens * self.token_bytes

    @property
    def starts_at(self) -> int:
        return self.mask_at + (self.num_tokens if self.has_mask else 0)

    @property
    def blocks_at(self) -> int:
        return self.starts_at + 8 * self.num_documents

    @property
    def num_bytes(self) -> int:
        return self.blocks_at + 24 * self.num_blocks

    def pack(self) -> bytes:
        fields = (self.token_bytes, self.vocab_size, self.num_tokens, self.num_documents, self.has_mask, BLOCK_TOKENS)
        return _HEADER.pack(MAGIC, VERSION, *fields, self.tokenizer_hash.encode()).ljust(_HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes, file: Path) -> Header:
        magic, version, token_bytes, vocab, tokens, documents, mask, block, digest = _HEADER.unpack_from(raw)
        if magic != MAGIC or version != VERSION or block != BLOCK_TOKENS or token_bytes not in (2, 4):
            raise BadData(f"{file}, offset 0: no shard of version {VERSION}; prepare the data again")
        return cls(token_bytes, vocab, tokens, documents, bool(mask), digest.decode("ascii", "replace"))


class ShardWriter:
    """Writes FILE.tmp, and FILE at `close`. Memory: starts, mask and half a MiB of tokens."""

    def __init__(self, file: Path, vocab_size: int, dtype: np.dtype, tokenizer_hash: str):
        self.file, self.vocab_size, self.tokenizer_hash = file, vocab_size, tokenizer_hash
        self.dtype = dtype.newbyteorder("<")
        self.num_tokens = self.largest_id = 0
        self._starts = array("Q")
        self._mask: bytearray | None = None
        self._pending: list[np.ndarray] = []
        self._pending_tokens = 0
        self._hashes: list[int] = []
        self._out = file.with_name(f"{file.name}.tmp").open("wb")
        self._out.write(bytes(_HEADER_BYTES))

    def add(self, document: Tokens) -> None:
        if not document.goes_on:
            self._starts.append(self.num_tokens)
        if document.learned is not None and self._mask is None:
            self._mask = bytearray(b"\1" * self.num_tokens)  # the documents so far are learned whole
        if self._mask is not None:
            learned = document.learned
            self._mask += b"\1" * len(document.ids) if learned is None else learned.astype(np.uint8).tobytes()
        self.num_tokens += len(document.ids)
        self._pending.append(document.ids)
        self._pending_tokens += len(document.ids)
        if self._pending_tokens >= _FLUSH_TOKENS:
            self._flush(whole_blocks=True)

    def close(self) -> tuple[Header, str]:
        """Finish the file; its header and the hash of its index."""
        self._flush(whole_blocks=False)
        mask = self._mask or b""
        masked = self._mask is not None
        fields = (self.dtype.itemsize, self.vocab_size, self.num_tokens, len(self._starts), masked, self.tokenizer_hash)
        header = Header(*fields)
        rows = np.zeros((header.num_blocks, 3), dtype="<u8")
        rows[:, 0] = self._hashes
        if masked:
            rows[:, 1] = [_hash(mask[i : i + BLOCK_TOKENS]) for i in range(0, len(mask), BLOCK_TOKENS)]
        starts = np.frombuffer(self._starts, dtype=np.uint64).astype("<u8")
        rows[:, 2] = np.searchsorted(starts, np.arange(header.num_blocks, dtype=np.uint64) * np.uint64(BLOCK_TOKENS))
        index = starts.tobytes() + rows.tobytes()
        self._out.write(mask + index)
        self._out.seek(0)
        self._out.write(header.pack())
        self._out.flush()
        os.fsync(self._out.fileno())
        self._out.close()
        Path(self._out.name).replace(self.file)
        return header, xxhash.xxh3_128_hexdigest(header.pack() + index)

    def abandon(self) -> None:
        """Leave nothing behind; for errors."""
        self._out.close()
        Path(self._out.name).unlink(missing_ok=True)

    def _flush(self, whole_blocks: bool) -> None:
        if not self._pending:
            return
        tokens = np.concatenate(self._pending).astype(self.dtype, copy=False)
        self.largest_id = max(self.largest_id, int(tokens.max()))
        count = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS if whole_blocks else len(tokens)
        for begin in range(0, count, BLOCK_TOKENS):
            self._hashes.append(_hash(tokens[begin : min(begin + BLOCK_TOKENS, count)]))
        self._out.write(tokens[:count].tobytes())
        self._pending = [tokens[count:]] if count < len(tokens) else []
        self._pending_tokens = len(tokens) - count


class Shard:
    """A shard, opened. Its table of blocks is in memory: 24 bytes for every 64 KiB of tokens."""

    def __init__(self, file: Path):
        self.path = file
        try:
            self._file = file.open("rb", buffering=0)
        except OSError as error:
            raise BadData(
                f"{file}: cannot be opened ({error.strerror}); bring it back or prepare the data again"
            ) from error
        self.header = Header.unpack(self._read(0, _HEADER_BYTES), file)
        size = os.fstat(self._file.fileno()).st_size
        if size != self.header.num_bytes:
            raise BadData(
                f"{file}, offset {min(size, self.header.num_bytes)}: it has {size} bytes of {self.header.num_bytes}; "
                "bring it back or prepare the data again"
            )
        raw = self._read(self.header.blocks_at, 24 * self.header.num_blocks)
        self._blocks = np.frombuffer(raw, dtype="<u8").reshape(-1, 3)

    def close(self) -> None:
        self._file.close()

    def verify_index(self, index_hash: str) -> None:
        """BadData unless header, starts and table are as written."""
        digest = xxhash.xxh3_128(self.header.pack())
        at = self.header.starts_at
        while at < self.header.num_bytes:
            piece = self._read(at, min(1 << 20, self.header.num_bytes - at))
            digest.update(piece)
            at += len(piece)
        if digest.hexdigest() != index_hash:
            raise BadData(
                f"{self.path}, offset {self.header.starts_at}: its index is not what was written; "
                "bring it back or prepare the data again"
            )

    def window(self, start: int, end: int) -> Window:
        """Tokens `start` to `end`, of blocks that were verified.

        Raises:
            BadData: changed or missing bytes, an id past the vocabulary, a document of length 0.
        """
        assert 0 <= start < end <= self.header.num_tokens
        first, last = start // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)
        begin = first * BLOCK_TOKENS
        tokens = np.frombuffer(
            self._verified(first, last, _HEADER_BYTES, self.header.token_bytes, 0), self.header.dtype
        )
        ids = tokens[start - begin : end - begin]
        if int(ids.max()) >= self.header.vocab_size:
            position = start + int((ids >= self.header.vocab_size).argmax())
            offset = _HEADER_BYTES + position * self.header.token_bytes
            raise BadData(
                f"{self.path}, offset {offset}: the token id {ids[position - start]} is past the vocabulary of "
                f"{self.header.vocab_size}; prepare the data again"
            )
        learned = None
        if self.header.has_mask:
            mask = np.frombuffer(self._verified(first, last, self.header.mask_at, 1, 1), np.uint8)
            learned = mask[start - begin : end - begin].astype(bool)
        return Window(ids, self._starts(first, last, start, end), learned)

    def starts(self) -> np.ndarray:
        """Where each document begins (int64)."""
        raw = self._read(self.header.starts_at, 8 * self.header.num_documents)
        return np.frombuffer(raw, dtype="<u8").astype(np.int64)

    def _starts(self, first: int, last: int, start: int, end: int) -> np.ndarray:
        low = int(self._blocks[first, 2])
        high = int(self._blocks[last, 2]) if last < self.header.num_blocks else self.header.num_documents
        at = self.header.starts_at + 8 * low
        starts = np.frombuffer(self._read(at, 8 * (high - low)), dtype="<u8").astype(np.int64)
        if (np.diff(starts) <= 0).any():
            document = int((np.diff(starts) <= 0).argmax())
            raise BadData(f"{self.path}, offset {at + 8 * document}: a document of length 0; prepare the data again")
        return starts[slice(*np.searchsorted(starts, [start, end]))] - start

    def _verified(self, first: int, last: int, base: int, item_bytes: int, column: int) -> bytes:
        """The bytes of some blocks of tokens or mask."""
        block_bytes = BLOCK_TOKENS * item_bytes
        begin, end = first * block_bytes, min(last * block_bytes, self.header.num_tokens * item_bytes)
        raw = self._read(base + begin, end - begin)
        for block in range(first, last):
            at = block * block_bytes - begin
            if _hash(memoryview(raw)[at : at + block_bytes]) != int(self._blocks[block, column]):
                raise BadData(
                    f"{self.path}, offset {base + block * block_bytes}: the {block_bytes >> 10} KiB from there are not "
                    "what was written; bring the file back or prepare the data again"
                )
        return raw

    def _read(self, offset: int, count: int) -> bytes:
        try:
            raw = os.pread(self._file.fileno(), count, offset)
            while len(raw) < count and (more := os.pread(self._file.fileno(), count - len(raw), offset + len(raw))):
                raw += more
        except OSError as error:
            raise BadData(f"{self.path}, offset {offset}: cannot be read ({error.strerror})") from error
        if len(raw) < count:
            end = min(offset + len(raw), os.fstat(self._file.fileno()).st_size)
            raise BadData(f"{self.path}, offset {end}: the file ends there; bring it back")
        return raw


def _hash(data: Any) -> int:
    return xxhash.xxh3_64_intdigest(data)
