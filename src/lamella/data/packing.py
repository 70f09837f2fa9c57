"""Tokens -> samples of a fixed length: windows of text, or whole conversations.

EOS follows every text and is learned. In a sample positions restart at every document, which attention follows, and the
label that would lead from a document into the next is IGNORE_INDEX, as is that of every token of a conversation that
is not the assistant's.

Shapes: N tokens in the stream, L tokens in a sample.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from lamella.architecture.embedded import cache_dir
from lamella.architecture.tokenizer_files import template_fingerprint
from lamella.data.prepare import Done, finish, make_batches, make_manifest, tokenised, write_units
from lamella.data.prepare import renderer as text_renderer
from lamella.data.prepared import TokenFolder, open_prepared
from lamella.data.readers import BadRecords, Policy
from lamella.data.shards import Window
from lamella.data.sources import MANIFEST, Source, Split, check_split, fingerprint, open_source, records
from lamella.data.tokenizer import DocumentTokenizer
from lamella.data.tokenizer import fingerprint as tokenizer_fingerprint
from lamella.errors import UserError

IGNORE_INDEX = -100
FORMAT = "5"  # raise it when what is cached changes: old caches are then left alone
CACHED_UNIT_BYTES = 1 << 30


class Sample(NamedTuple):
    """int64 tensors. `labels_L[j]` is the token that follows `input_ids_L[j]`, or IGNORE_INDEX."""

    input_ids_L: Tensor
    labels_L: Tensor
    positions_L: Tensor


class Samples(Protocol):
    """Samples of one source; sample i is the same for ever, and reading it reads no other."""

    seq_len: int
    hash: str
    """Of the text: with another one, sample i is another."""

    def __len__(self) -> int:
        """Samples in an epoch."""
        ...

    def sample(self, index: int) -> Sample: ...


class PackedSamples:
    """Fixed-length samples of a token stream; sample i is the same for ever, on any number of ranks.

    Consecutive windows of L tokens, in file order without a seed, else in an order drawn anew for each epoch from
    (seed, epoch). Epoch e is samples e * len(self) up to (e + 1) * len(self), so `sample` takes any i >= 0 and a
    run resumes at any sample without reading those before.
    """

    def __init__(self, tokens: TokenFolder, seq_len: int, seed: int | None = None):
        check_length(tokens, seq_len)
        self.tokens, self.seq_len, self.seed, self.hash = tokens, seq_len, seed, tokens.hash
        self._epoch = -1
        self._order: np.ndarray | None = None

    def __len__(self) -> int:
        """Samples in an epoch."""
        return (len(self.tokens) - 1) // self.seq_len

    def sample(self, index: int) -> Sample:
        """Sample `index`, counted over epochs. Raises BadData (see `lamella.data.shards`)."""
        epoch, position = divmod(index, len(self))
        start = self._window(epoch, position) * self.seq_len
        return make_sample(*self.tokens.window(start, start + self.seq_len + 1))

    def _window(self, epoch: int, position: int) -> int:
        if self.seed is None:
            return position
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            self._epoch = epoch
        assert self._order is not None
        return int(self._order[position])


class PackedConversations:
    """Samples of whole conversations: as many, in file order, as fit into L + 1 tokens; EOS, unlearned, fills the rest.

    None begins in the middle, where the answers would lack their questions; one that is longer is cut at its end. The
    table of samples is made when opened, 16 bytes for each.
    """

    def __init__(self, tokens: TokenFolder, seq_len: int):
        check_length(tokens, seq_len)
        self.tokens, self.seq_len, self.hash = tokens, seq_len, tokens.hash
        bounds = np.append(tokens.document_starts(), len(tokens))
        self.spans = whole_documents(bounds, seq_len + 1)
        self.num_cut = int((np.diff(bounds) > seq_len + 1).sum())
        """Conversations that are longer than a sample."""

    def __len__(self) -> int:
        return len(self.spans)

    def sample(self, index: int) -> Sample:
        start, end = map(int, self.spans[index % len(self)])
        return make_sample(*padded(self.tokens.window(start, end), self.seq_len + 1, self.tokens.eos_id))


def check_length(tokens: TokenFolder, seq_len: int) -> None:
    if seq_len < 1:
        raise UserError(f"the sample length is {seq_len}; it must be at least 1")
    if len(tokens) <= seq_len and not tokens.is_chat():
        raise UserError(
            f"the text has {len(tokens)} tokens, too few for one sample of {seq_len} and the token after it; "
            "use more text or a shorter sample"
        )


def samples_of(tokens: TokenFolder, seq_len: int) -> Samples:
    """Windows of text; whole conversations where there are any."""
    return PackedConversations(tokens, seq_len) if tokens.is_chat() else PackedSamples(tokens, seq_len)


def whole_documents(bounds: np.ndarray, size: int) -> np.ndarray:
    """Greedy spans [S, 2] of consecutive whole documents of at most `size` tokens; longer documents are cut.

    `bounds`: where each document begins, and where the last one ends.
    """
    spans = []
    first = 0
    while first < len(bounds) - 1:
        start = bounds[first]
        following = int(np.searchsorted(bounds, start + size, side="right")) - 1
        end = bounds[following] if following > first else start + size
        spans.append((start, end))
        first = max(following, first + 1)
    return np.array(spans, dtype=np.int64)


def padded(window: Window, size: int, eos_id: int) -> Window:
    """The window with a last document of EOS that is not learned, up to `size` tokens."""
    count = size - len(window.ids)
    if count == 0:
        return window
    learned = np.ones(len(window.ids), bool) if window.learned is None else window.learned
    return Window(
        np.append(window.ids, np.full(count, eos_id, window.ids.dtype)),
        np.append(window.starts, len(window.ids)),
        np.append(learned, np.zeros(count, bool)),
    )


def make_sample(ids: np.ndarray, starts: np.ndarray, learned: np.ndarray | None = None) -> Sample:
    """L + 1 tokens, the offsets in them at which documents begin, which of them are learned -> a sample of L."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    labels_L = tokens[1:].clone()
    labels_L[torch.from_numpy(starts[starts > 0] - 1)] = IGNORE_INDEX
    if learned is not None:
        labels_L[torch.from_numpy(~learned[1:])] = IGNORE_INDEX
    L = len(labels_L)
    begins_L = np.zeros(L, dtype=np.int64)
    begins_L[starts[starts < L]] = starts[starts < L]
    return Sample(tokens[:-1], labels_L, torch.from_numpy(np.arange(L) - np.maximum.accumulate(begins_L)))


def token_file(
    source: str,
    split: Split | None,
    tokenizer: str | Path,
    *,
    cache: Path | None = None,
    max_tokens: int | None = None,
    on_bad_data: Policy = "fail",
) -> TokenFolder:
    """The tokens of `source`: of a prepared folder, from the cache, or made now.

    Several processes may ask at once: one of them writes.

    Args:
        tokenizer: folder or hub name of the model.
        cache: folder in place of `lamella.checkpoint.embedded.cache_dir()`.
        max_tokens: stop with the document that reaches this many; needed for `datasets` names, which are streamed.
        on_bad_data: broken records: "fail" names the first, "skip" leaves them out.

    Raises:
        UserError: see `lamella.data.sources.documents`; no tokenizer; no text in this split.
    """
    from filelock import FileLock

    check_split(split)
    opened = open_source(source)
    if opened.kind == "prepared":
        return open_prepared(opened.root, split, tokenizer)
    if opened.is_streamed and max_tokens is None:
        raise UserError(f"{source} is streamed: say how many tokens to keep of it")
    # The template counts for plain text as well: whether there are conversations is known only after reading.
    hashes = [fingerprint(opened), tokenizer_fingerprint(tokenizer), template_fingerprint(tokenizer)]
    made_by = [*hashes, str(split), str(max_tokens), FORMAT, on_bad_data]
    folder = (cache or cache_dir()) / "tokens" / xxhash.xxh3_128_hexdigest("\n".join(made_by).encode())
    if not (folder / MANIFEST).exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / MANIFEST).exists():
                _write(folder, opened, split, tokenizer, max_tokens, BadRecords(on_bad_data))
    return open_prepared(folder, None)


def _write(
    folder: Path, source: Source, split: Split | None, tokenizer: str | Path, max_tokens: int | None, bad: BadRecords
) -> None:
    """Tokenise in this process; the folder appears when it is whole."""
    encode = DocumentTokenizer(tokenizer)
    inputs = {"source": source.word, "split": split, "tokenizer": str(tokenizer), "unit_bytes": CACHED_UNIT_BYTES}
    manifest = make_manifest(inputs, tokenizer, encode.encoder)
    stream = (r for r in records(source, bad) if split in (None, r.split))
    batches = make_batches(stream, text_renderer(encode, tokenizer), bad, manifest, lambda _: split or "all")
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}."))
    title = f"{source.word} ({split or 'all'})"
    try:
        with _progress(title) as report, tokenised(batches, encode.encoder, workers=0) as results:
            write_units(temporary, manifest, results, encode.encoder, max_tokens=max_tokens, report=report)
        finish(temporary, manifest, title, bad)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[Done], None]]:
    """Shows the tokens done, on a terminal only; the total is not known before the end."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("tokenise {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title)
        yield lambda done: progress.update(task, description=f"{title}: {done.num_tokens:,} tokens")
