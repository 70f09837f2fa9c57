"""Samples packed on the fly, in the order of the text: for text that is too large to tokenise first.

A source is read from a place that can be written down: of local files file, byte and record, of a `datasets`
stream its own state. So a run goes on where it stood without reading what came before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from lamella.data.packing import Sample, make_sample
from lamella.data.prepare import plain_text
from lamella.data.readers import BadRecords, Place, Policy, Record
from lamella.data.sources import Source, Split, load_stream, open_source, records, records_of, text_of
from lamella.data.tokenizer import DocumentTokenizer, Text, check_vocabulary
from lamella.data.tokenizer import fingerprint as tokenizer_fingerprint
from lamella.errors import BadData, UserError

BATCH_CHARS = 1 << 18
LEAST_CHARS = 1 << 14
"""A rank tokenises at least so much at once, however many there are."""


class Ranks(NamedTuple):
    """Those that tokenise a stream together, each its share of the texts."""

    rank: int = 0
    size: int = 1
    gather: Callable[[object], list[object]] = lambda mine: [mine]
    """What all ranks give, in their order; all call it equally often."""


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: a place in its source, and the tokens that were read before it and not given out."""

    index: int
    """Of the next sample."""
    epoch: int
    place: Any
    ids: np.ndarray
    starts: np.ndarray


class Tokens(NamedTuple):
    """Documents, or pieces of them, one after the other."""

    ids: np.ndarray
    starts: np.ndarray
    """Where documents begin."""


class FileReading:
    """Records of local text; the place is that behind the last record."""

    def __init__(self, source: Source, bad: BadRecords):
        self.source, self.bad = source, bad
        self.sizes = [file.stat().st_size for file in source.files]

    def start(self, place: Any, epoch: int) -> Iterator[Record]:
        """The records from this place on (None: the first) to the end of the source."""
        return records(self.source, self.bad, Place(*(place or ())))

    def place(self, last: Record) -> Any:
        """Behind the last record of `start`, for JSON."""
        return list(last.end)

    def share(self, place: Any) -> float:
        """Of the source, before this place; 0 where it has no files."""
        at = Place(*(place or ()))
        return (sum(self.sizes[: at.file]) + at.read) / max(1, sum(self.sizes))

    def identity(self) -> Any:
        """Changes when the text does, as far as names and sizes tell."""
        names = [file.relative_to(self.source.root).as_posix() for file in self.source.files]
        return [self.source.field, list(zip(names, self.sizes, strict=True)) or self.source.word]


class SetReading:
    """The same of a set that `datasets` streams, which keeps its place itself. Its length is not known."""

    def __init__(self, source: Source, bad: BadRecords, stream: Any):
        self.source, self.bad, self.stream = source, bad, stream
        self.first = {"stream": stream.state_dict(), "records": 0}

    def start(self, place: Any, epoch: int) -> Iterator[Record]:
        place = place or self.first
        # datasets goes on from a state only in the epoch that it was taken in
        self.stream.set_epoch(epoch)
        self.stream.load_state_dict(place["stream"] | {"epoch": epoch})
        return records_of(self.stream, self.source, self.bad, place["records"])

    def place(self, last: Record) -> Any:
        return {"stream": self.stream.state_dict(), "records": last.end.records}

    def share(self, place: Any) -> float:
        return 0.0

    def identity(self) -> Any:
        return self.source.word


class StreamedSamples:
    """Windows of L tokens of a source, over and over; sample i is the same for ever, on any number of ranks.

    They are asked for in ascending order: on the way to a sample all before it are read and tokenised, from the last
    one on. Several ranks share the tokenising (`ranks`): each reads all of the text and tokenises its part of it. They
    then must call `read_ahead` equally often and with the same numbers; nothing else reads.
    """

    def __init__(
        self,
        source: str,
        split: Split | None,
        tokenizer: str | Path,
        seq_len: int,
        *,
        vocab_size: int | None = None,
        on_bad_data: Policy = "fail",
        stream: Any = None,
    ):
        """Reads the first sample's text, so that what is wrong with the source is known at once.

        Args:
            vocab_size: of the model; a larger id is refused.
            stream: in place of what the source's name means, any `datasets.IterableDataset` of records.

        Raises:
            UserError: see `lamella.data.sources.documents`; conversations, tokens, too little text for one sample.
        """
        opened = Source(source, "dataset", field=source.partition("#")[2] or None) if stream else open_source(source)
        if opened.kind == "prepared":
            raise UserError(f"{source} is prepared: a step reads only its own samples; leave out stream: true")
        self.source, self.split, self.tokenizer, self.seq_len = source, split, str(tokenizer), seq_len
        self.vocab_size = vocab_size
        self.encode = DocumentTokenizer(tokenizer).encoder
        bad = BadRecords(on_bad_data)
        is_set = opened.kind == "dataset"
        self.reading = SetReading(opened, bad, stream or load_stream(opened)) if is_set else FileReading(opened, bad)
        made_by = [self.reading.identity(), split, seq_len, tokenizer_fingerprint(tokenizer)]
        self.hash = xxhash.xxh3_128_hexdigest(json.dumps(made_by).encode())
        self.ranks = Ranks()
        self._place: Any
        self._records: Iterator[Record] | None
        self._failure: BadData | None = None
        """Why the last call of `read_ahead` was in vain."""
        self._restart()
        self._read(1)

    def read_ahead(self, index: int) -> None:
        """Read the text of all samples before `index`, so that `sample` and `advance` need not. Where a file cannot be
        read any more, they say so.
        """
        self._failure = None
        try:
            self._read(index - self.index)
        except BadData as error:
            self._failure = error

    def sample(self, index: int) -> Sample:
        """Sample `index`, which is none before the last one.

        Raises:
            BadData: a file cannot be read any more.
            UserError: a broken record, with the policy "fail".
        """
        self.advance(index)
        L = self.seq_len
        self._need()
        sample = make_sample(self._ids[: L + 1], self._starts[self._starts <= L])
        self._drop()
        return sample

    def advance(self, index: int) -> None:
        """Read up to sample `index`."""
        assert index >= self.index, "a stream goes forward"
        while self.index < index:
            self._need()
            self._drop()

    def _need(self) -> None:
        """The tokens of the next sample."""
        if len(self._ids) <= self.seq_len and self._failure is not None:
            raise self._failure
        self._read(1)

    @property
    def state(self) -> StreamState:
        """Where the stream stands. It stays what it is while the stream goes on, and costs nothing."""
        return StreamState(self.index, self.epoch, self._place, self._ids, self._starts)

    def passes(self, state: StreamState | None = None) -> float:
        """How often the source has been gone through, estimated; of a `datasets` name, as far as whole passes tell.

        Args:
            state: where the stream stood; None: where it stands.
        """
        state = state or self.state
        given = state.index * self.seq_len
        return (state.epoch + self.reading.share(state.place)) * given / (given + len(state.ids))

    def state_dict(self, state: StreamState | None = None) -> dict[str, Any]:
        """A state, that of now where none is given, for JSON."""
        values = vars(state or self.state)
        return values | {"ids": values["ids"].tolist(), "starts": values["starts"].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restart()
        self.index, self.epoch, self._place = state["index"], state["epoch"], state["place"]
        self._ids = np.asarray(state["ids"], dtype=self.encode.dtype)
        self._starts = np.asarray(state["starts"], dtype=np.int64)

    def _restart(self) -> None:
        self.index = self.epoch = 0
        self._place = self._records = None
        self._ids = np.zeros(0, dtype=self.encode.dtype)
        self._starts = np.zeros(0, dtype=np.int64)

    def _drop(self) -> None:
        """The first sample of the tokens at hand."""
        L = self.seq_len
        self._ids, self._starts = self._ids[L:], self._starts[self._starts >= L] - L
        self.index += 1

    def _read(self, num_samples: int) -> None:
        """Until the tokens of so many samples are at hand, and the one after them."""
        while len(self._ids) <= num_samples * self.seq_len:
            if self._records is None:
                self._records = self.reading.start(self._place, self.epoch)
            last, mine = self._next_share(self._records)
            parts = self.ranks.gather(mine)
            for part in parts:
                if isinstance(part, Exception):
                    self._records = None  # the next call tries again from the same place
                    raise part
            if last is None:
                self._next_epoch()
                continue
            self._place = self.reading.place(last)
            for part in parts:
                assert isinstance(part, Tokens)
                self._append(part)

    def _next_share(self, stream: Iterator[Record]) -> tuple[Record | None, Tokens | Exception]:
        """Read on, and tokenise this rank's share of it.

        Returns:
            (the last record that was read, if any; the tokens, or what all ranks are to raise).
        """
        last: Record | None = None
        mine: list[Text] = []
        try:
            for rank in range(self.ranks.size):
                texts, record = self._next_texts(stream)
                last = record or last
                mine = texts if rank == self.ranks.rank else mine
            return last, self._tokenised(mine)
        except OSError as error:
            return last, BadData(f"{self.source} cannot be read any more: {error}; bring it back and start again")
        except UserError as error:
            return last, error

    def _next_texts(self, stream: Iterator[Record]) -> tuple[list[Text], Record | None]:
        """(texts of the split, the last record that was read, if any)."""
        texts, num_chars, record = [], 0, None
        enough = max(BATCH_CHARS // self.ranks.size, min(LEAST_CHARS, BATCH_CHARS))
        for record in stream:
            if self.split in (None, record.split) and not record.is_blank:
                texts.append(plain_text(text_of(record), self.split or "all"))
                num_chars += len(texts[-1].text)
            if num_chars >= enough:
                break
        return texts, record

    def _tokenised(self, texts: list[Text]) -> Tokens:
        documents = [tokens for tokens in self.encode(texts) if len(tokens.ids)] if texts else []
        if not documents:
            return Tokens(self._ids[:0], self._starts[:0])
        ids = np.concatenate([tokens.ids for tokens in documents])
        if self.vocab_size is not None:
            check_vocabulary(self.source, int(ids.max()), self.vocab_size, self.tokenizer)
        lengths = np.asarray([len(tokens.ids) for tokens in documents])
        starts = np.cumsum(lengths) - lengths
        return Tokens(ids, starts[[not tokens.goes_on for tokens in documents]])

    def _append(self, tokens: Tokens) -> None:
        starts = len(self._ids) + tokens.starts
        self._ids, self._starts = np.concatenate([self._ids, tokens.ids]), np.concatenate([self._starts, starts])

    def _next_epoch(self) -> None:
        if self.index == 0 and len(self._ids) <= self.seq_len:
            raise UserError(
                f"{self.source} ({self.split or 'all'}) has {len(self._ids)} tokens, too few for one sample of "
                f"{self.seq_len} and the token after it; use more text or a shorter sample"
            )
        self.epoch += 1
        self._place = self._records = None
