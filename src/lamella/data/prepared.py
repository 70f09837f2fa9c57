"""A folder of shards: the tokens of one or several sources, tokenised once, opened like any other data.

    lamella-data.json     the manifest: what the tokens were made from, the tokenizer, every shard with its index's hash
    train-00000.shard     see `lamella.data.shards`; a unit of text gives one shard of each split
    heldout-00000.shard

The manifest appears with the first finished unit and is replaced whole after each, so that a killed preparation goes on
with the units that are missing. Imports no torch.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from lamella.architecture.tokenizer_files import template_fingerprint
from lamella.data.files import MANIFEST
from lamella.data.readers import Split
from lamella.data.shards import Shard, Window
from lamella.data.tokenizer import fingerprint
from lamella.errors import BadData, UserError

VERSION = 2
MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class ShardEntry:
    file: str
    split: str
    num_bytes: int
    num_tokens: int
    num_documents: int
    has_mask: bool
    largest_id: int
    index_hash: str


@dataclass
class Manifest:
    inputs: dict[str, Any]
    """What the tokens are a function of: sources, tokenizer, size of a unit. Another value is other data."""
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    units: dict[int, list[ShardEntry]] = field(default_factory=dict)
    """The finished units of text."""
    complete: bool = False
    template_hash: str = ""
    """Of the chat templates; matters where there are conversations. "": not known."""
    left_out: str = ""
    """Records that are not in it, for people."""

    def shards(self, split: Split | None) -> list[ShardEntry]:
        """In the order of the text."""
        return [e for unit in sorted(self.units) for e in self.units[unit] if split in (None, e.split)]

    def num_tokens(self, split: Split | None = None) -> int:
        return sum(entry.num_tokens for entry in self.shards(split))

    def is_chat(self) -> bool:
        """Whether there are conversations in it."""
        return any(entry.has_mask for entry in self.shards(None))

    def has_other_template(self, template_hash: str) -> bool:
        """Whether conversations in it were rendered by another chat template than this."""
        return self.is_chat() and self.template_hash not in ("", template_hash)

    def identity(self) -> dict[str, Any]:
        """What a later call must have in common to go on; the model's name may differ where its tokenizer does not."""
        inputs = {key: value for key, value in self.inputs.items() if key != "tokenizer"}
        return inputs | {"tokenizer": self.tokenizer_hash}

    def write(self, folder: Path) -> None:
        """Replace the manifest whole."""
        values = {"format": "lamella tokens", "version": VERSION} | asdict(self)
        temporary = folder / f".{MANIFEST}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """UserError where there is none, or one that cannot be read."""
    file = folder / MANIFEST
    try:
        values = json.loads(file.read_text("utf-8"))
        assert values.pop("format") == "lamella tokens"
        if (version := values.pop("version")) != VERSION:
            raise UserError(f"{folder} is of version {version}, and this reads {VERSION}; prepare the data again")
        units = {int(unit): [ShardEntry(**e) for e in entries] for unit, entries in values.pop("units").items()}
        shards = [entry for entries in units.values() for entry in entries]
        if not all(isinstance(e.file, str) and Path(e.file).name == e.file for e in shards):
            raise ValueError("a shard is no file of the folder")
        if not all(0 <= n < 1 << 62 for e in shards for n in (e.num_bytes, e.num_tokens, e.num_documents)):
            raise ValueError("a shard of less than nothing, or more than any disk holds")
        return Manifest(**values, units=units)
    except FileNotFoundError:
        raise UserError(f"{folder} holds no {MANIFEST}; make it with `lamella data prepare`") from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} is damaged ({error}); bring it back or prepare the data again") from error


class TokenFolder:
    """The shards of one split (None: of all), one after the other: any stretch of their tokens, verified as it is read.

    What is in memory does not grow with the text: at most 64 shards are open at a time.
    """

    def __init__(self, folder: Path, split: Split | None, manifest: Manifest):
        self.folder, self.eos_id, self.vocab_size = folder, manifest.eos_id, manifest.vocab_size
        self.left_out = manifest.left_out
        self.entries = manifest.shards(split)
        self._ends = np.array([0, *accumulate(e.num_tokens for e in self.entries)])
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_documents(self) -> int:
        return sum(e.num_documents for e in self.entries)

    @property
    def largest_id(self) -> int:
        """What a model's vocabulary must be larger than."""
        return max(e.largest_id for e in self.entries)

    @property
    def hash(self) -> str:
        """Of everything in it (32 hexadecimal digits)."""
        return xxhash.xxh3_128_hexdigest("".join(entry.index_hash for entry in self.entries).encode())

    def is_chat(self) -> bool:
        """Whether there are conversations in it: documents of which a part is learned."""
        return any(e.has_mask for e in self.entries)

    def window(self, start: int, end: int) -> Window:
        """Tokens `start` to `end` of the stream. Raises BadData."""
        assert 0 <= start < end <= len(self)
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        last = int(np.searchsorted(self._ends, end, side="left"))
        parts = []
        for i in range(first, last):
            low, high = int(self._ends[i]), int(self._ends[i + 1])
            part = self._shard(i).window(max(start, low) - low, min(end, high) - low)
            parts.append(part._replace(starts=part.starts + (max(start, low) - start)))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def document_starts(self) -> np.ndarray:
        """Where each document begins (int64); 8 bytes each."""
        return np.concatenate([self._shard(i).starts() + self._ends[i] for i in range(len(self.entries))])

    def verify(self) -> None:
        """BadData unless every shard's size, header and index are as written. Reads a byte in a hundred or so."""
        for i, entry in enumerate(self.entries):
            shard = self._shard(i)
            shard.verify_index(entry.index_hash)
            if shard.header.num_tokens != entry.num_tokens:
                raise BadData(f"{shard.path}, offset 24: {shard.header.num_tokens} tokens, not {entry.num_tokens}")

    def _shard(self, index: int) -> Shard:
        if index in self._open:
            self._open.move_to_end(index)
        else:
            self._open[index] = Shard(self.folder / self.entries[index].file)
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[index]


def _joined(parts: list[Window]) -> Window:
    learned = None
    if any(p.learned is not None for p in parts):
        learned = np.concatenate([np.ones(len(p.ids), bool) if p.learned is None else p.learned for p in parts])
    return Window(np.concatenate([p.ids for p in parts]), np.concatenate([p.starts for p in parts]), learned)


def open_prepared(folder: Path, split: Split | None, tokenizer: str | Path | None = None) -> TokenFolder:
    """The tokens of a finished folder; headers, sizes and indices of all shards are verified.

    Args:
        tokenizer: the model's folder (or hub name), whose tokenizer must be that of the tokens; None: not asked.

    Raises:
        UserError: unfinished, of another tokenizer, nothing in this split; BadData: damaged.
    """
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise UserError(f"{folder} is not finished; call the `lamella data prepare` that began it once more")
    if tokenizer is not None and fingerprint(tokenizer) != manifest.tokenizer_hash:
        raise UserError(
            f"the tokens of {folder} were made by another tokenizer than that of {tokenizer} "
            f"({manifest.inputs.get('tokenizer')}); prepare them with --model {tokenizer}"
        )
    if tokenizer is not None and manifest.has_other_template(template_fingerprint(tokenizer)):
        raise UserError(
            f"the conversations of {folder} were rendered by another chat template than that of {tokenizer}; prepare "
            f"them with --model {tokenizer}"
        )
    tokens = TokenFolder(folder, split, manifest)
    if not len(tokens):
        raise UserError(f"{folder} ({split or 'all'}) holds no text; use another split or more data")
    tokens.verify()
    return tokens
