"""Documents -> one token file, memory-mapped and cached -> samples of a fixed length, in an order made from a seed.

EOS follows every document and is learned. A sample is a window of the token stream; in it positions restart at every
document, and the label that would lead from an EOS into the next document is IGNORE_INDEX.

Shapes: N tokens in the file, L tokens in a sample.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from lamella.data.sources import Split, documents, fingerprint, open_source
from lamella.embedded import cache_dir
from lamella.errors import UserError

IGNORE_INDEX = -100
BATCH_DOCUMENTS = 64
FORMAT = "1"  # raise it when the layout of a token file changes: old caches are then left alone


class Sample(NamedTuple):
    """int64 tensors. `labels_L[j]` is the token that follows `input_ids_L[j]`, or IGNORE_INDEX."""

    input_ids_L: Tensor
    labels_L: Tensor
    positions_L: Tensor


@dataclass(frozen=True)
class TokenFile:
    """A token file, opened: both arrays are memory maps."""

    folder: Path
    tokens_N: np.ndarray
    """uint16, or uint32 for vocabularies over 65,536."""
    starts: np.ndarray
    """int64, ascending: where each document begins."""
    eos_id: int

    def __len__(self) -> int:
        return len(self.tokens_N)


class PackedSamples:
    """Fixed-length samples of a token file; sample i is the same for ever, on any number of ranks.

    Consecutive windows of L tokens, in file order without a seed, else in an order drawn anew for each epoch from
    (seed, epoch). Epoch e is samples e * len(self) up to (e + 1) * len(self), so `sample` takes any i >= 0 and a
    run resumes at any sample without reading those before.
    """

    def __init__(self, tokens: TokenFile, seq_len: int, seed: int | None = None):
        if seq_len < 1:
            raise UserError(f"the sample length is {seq_len}; it must be at least 1")
        if len(tokens) <= seq_len:
            raise UserError(
                f"the text has {len(tokens)} tokens, too few for one sample of {seq_len} and the token after it; "
                "use more text or a shorter sample"
            )
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self._epoch = -1
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        """Samples in an epoch."""
        return (len(self.tokens) - 1) // self.seq_len

    def sample(self, index: int) -> Sample:
        """Sample `index`, counted over epochs."""
        epoch, position = divmod(index, len(self))
        start = self._window(epoch, position) * self.seq_len
        end = start + self.seq_len + 1
        low, high = np.searchsorted(self.tokens.starts, [start, end])
        return make_sample(self.tokens.tokens_N[start:end], self.tokens.starts[low:high] - start)

    def _window(self, epoch: int, position: int) -> int:
        if self.seed is None:
            return position
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            self._epoch = epoch
        assert self._order is not None
        return int(self._order[position])


def make_sample(tokens: np.ndarray, starts: np.ndarray) -> Sample:
    """L + 1 tokens and the offsets in them at which documents begin -> a sample of L."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    labels_L = ids[1:].clone()
    labels_L[torch.from_numpy(starts[starts > 0] - 1)] = IGNORE_INDEX
    L = len(labels_L)
    begins_L = np.zeros(L, dtype=np.int64)
    begins_L[starts[starts < L]] = starts[starts < L]
    return Sample(ids[:-1], labels_L, torch.from_numpy(np.arange(L) - np.maximum.accumulate(begins_L)))


class DocumentTokenizer:
    """The fast tokenizer of a folder or hub name. BOS comes only where the tokenizer itself adds it; EOS always."""

    def __init__(self, name: str | Path):
        from transformers import AutoTokenizer

        import lamella.models.hf  # noqa: F401  else a converted folder's tokenizer asks to trust the folder's code

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(name))
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"no tokenizer in {name} ({reason}); pass the folder of a model with its tokenizer"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {name} has no end-of-text token; set eos_token in tokenizer_config.json")
        self.eos_id: int = self.tokenizer.eos_token_id
        self.dtype = np.dtype(np.uint16 if len(self.tokenizer) <= 1 << 16 else np.uint32)

    def __call__(self, texts: Iterable[str]) -> list[list[int]]:
        """Token ids of each text, EOS at the end."""
        encoded = self.tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id] for ids in encoded["input_ids"]]


def token_file(
    source: str,
    split: Split | None,
    tokenizer: str | Path,
    *,
    cache: Path | None = None,
    max_tokens: int | None = None,
) -> TokenFile:
    """The tokens of `source`, from the cache or made now. Several processes may ask at once: one of them writes.

    Args:
        tokenizer: folder or hub name of the model.
        cache: folder in place of `lamella.embedded.cache_dir()`.
        max_tokens: stop with the document that reaches this many; needed for `datasets` names, which are streamed.

    Raises:
        UserError: see `lamella.data.sources.documents`; no tokenizer; no text in this split.
    """
    from filelock import FileLock

    opened = open_source(source)
    if opened.is_streamed and max_tokens is None:
        raise UserError(f"{source} is streamed: say how many tokens to keep of it, or use StreamedSamples")
    key = "\n".join([fingerprint(opened), str(split), _tokenizer_fingerprint(tokenizer), str(max_tokens), FORMAT])
    folder = (cache or cache_dir()) / "tokens" / xxhash.xxh3_128_hexdigest(key.encode())
    if not (folder / "meta.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "meta.json").exists():
                _write(folder, documents(source, split), f"{source} ({split or 'all'})", tokenizer, max_tokens)
    return open_token_file(folder)


def open_token_file(folder: Path) -> TokenFile:
    """Map a finished token file."""
    meta = json.loads((folder / "meta.json").read_text())
    tokens_N = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    return TokenFile(folder, tokens_N, np.load(folder / "starts.npy", mmap_mode="r"), meta["eos_id"])


def _write(folder: Path, texts: Iterator[str], title: str, tokenizer: str | Path, max_tokens: int | None) -> None:
    encode = DocumentTokenizer(tokenizer)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    try:
        with (temporary / "tokens.bin").open("wb") as file:
            starts = _write_tokens(file, texts, encode, title, max_tokens)
        if not starts:
            raise UserError(f"{title} holds no text; use another split or more data")
        np.save(temporary / "starts.npy", np.asarray(starts, dtype=np.int64))
        meta = {"title": title, "dtype": encode.dtype.name, "eos_id": encode.eos_id, "documents": len(starts)}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_tokens(
    file: IO[bytes], texts: Iterator[str], encode: DocumentTokenizer, title: str, max_tokens: int | None
) -> list[int]:
    """Write batch after batch; the starts of the documents."""
    starts: list[int] = []
    count = 0
    with _progress(title) as advance:
        for batch in _batches(texts):
            for ids in encode(batch):
                starts.append(count)
                count += len(ids)
                file.write(np.asarray(ids, dtype=encode.dtype).tobytes())
                if max_tokens is not None and count >= max_tokens:
                    return starts
            advance(len(starts), count)
    return starts


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the documents and tokens done, on a terminal only; the total is not known before the end."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("tokenise {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title)
        yield lambda docs, count: progress.update(task, description=f"{title}: {docs:,} documents, {count:,} tokens")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, BATCH_DOCUMENTS)):
        yield batch


def _tokenizer_fingerprint(tokenizer: str | Path) -> str:
    """Hash of the tokenizer's files in a local folder; a hub name stands for itself."""
    folder = Path(tokenizer)
    if not folder.is_dir():
        return str(tokenizer)
    digest = xxhash.xxh3_128()
    for file in sorted(p for pattern in ("*token*", "vocab*", "merges*") for p in folder.glob(pattern) if p.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
