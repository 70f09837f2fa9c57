"""Perplexity and multiple choice of a served model: the tokens of `lamella.evaluate`, the figures of its server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from transformers import PreTrainedTokenizerBase

from lamella.data.packing import IGNORE_INDEX, Sample
from lamella.errors import UserError
from lamella.evaluate.checkpoints import model_path
from lamella.evaluate.choice.scoring import Likelihood, token_pairs
from lamella.evaluate.choice.shared_prefixes import Ids
from lamella.evaluate.served.dialects import Dialect, Part, dialect_of
from lamella.evaluate.served.endpoint import Endpoint
from lamella.evaluate.served.names import gguf_file, is_served, is_url, tokenizer_folder
from lamella.export.gguf.llama_cpp import running

SLOTS = 4  # sequences of a GGUF file that are computed together: weights are read once for all


def check_model(name: str) -> None:
    """UserError for a model that is not there, and an endpoint that does not answer."""
    if not is_served(name):
        model_path(name)
    elif is_url(name):
        Endpoint(name).client.close()
    else:
        gguf_file(name)


def tokenizer_of(name: str, tokenizer: str | None, of_a_folder: Mapping[str, object]) -> str:
    """The folder or hub name of a model's tokenizer, served or not.

    Args:
        tokenizer: as the user named it, for a served model.
        of_a_folder: options and what they are, which a served model has no use for.

    Raises:
        UserError: no such model, nothing answers, no tokenizer, an option that has no effect.
    """
    if not is_served(name):
        if tokenizer is not None:
            raise UserError(f"--tokenizer is for GGUF files and endpoints; {name} has its own, so leave it out")
        return model_path(name)
    for option, value in of_a_folder.items():
        if value not in (None, "auto"):
            raise UserError(f"{option} has no effect on {name}, which is computed by its server; leave it out")
    check_model(name)
    return tokenizer_folder(name, tokenizer)


class Served:
    """A GGUF file or an endpoint, and the tokenizer of the model: a `Scorer`, and what measures windows of text."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase):
        """Start nothing yet."""
        self.name, self.tokenizer = name, tokenizer

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """See `lamella.evaluate.choice.scoring.Scorer`; what is longer than the model loses its first tokens."""
        wholes = [
            (pair.context + pair.continuation, len(pair.continuation)) for pair in token_pairs(self.tokenizer, pairs)
        ]
        with self._opened(max(len(ids) for ids, _ in wholes)) as (endpoint, dialect):
            parts = [self._fitting(ids, count, endpoint) for ids, count in wholes]
            scored = dialect.score(parts)
        return [Likelihood(sum(row.nats), all(row.greedy)) for row in scored]

    def nats(self, windows: list[Sample]) -> list[float]:
        """Of each window: the cross entropy of its labels, summed."""
        sequences = [_sequence(window) for window in windows]
        with self._opened(max(map(len, sequences))) as (endpoint, dialect):
            if (positions := endpoint.positions) and len(windows[0].input_ids_L) > positions:
                raise UserError(
                    f"windows of {len(windows[0].input_ids_L)} tokens are longer than the {positions} that {self.name} "
                    "takes; lower --seq-len"
                )
            self._check_ids(endpoint, max(map(max, sequences)))
            scored = dialect.score([Part(ids, 1) for ids in sequences])
        found = []
        for window, row in zip(windows, scored, strict=True):
            kept = (window.labels_L != IGNORE_INDEX).tolist()
            found.append(-sum(nats for nats, keep in zip(row.nats, kept, strict=False) if keep))
        return found

    @contextmanager
    def _opened(self, longest: int) -> Iterator[tuple[Endpoint, Dialect]]:
        """The server and how it is asked; that of a GGUF file has room for `longest` tokens, and ends when left."""
        if is_url(self.name):
            with Endpoint(self.name) as endpoint:
                yield endpoint, dialect_of(endpoint, self.tokenizer)
            return
        try:
            with running(gguf_file(self.name), longest + 8, SLOTS) as address, Endpoint(address, self.name) as endpoint:
                yield endpoint, dialect_of(endpoint, self.tokenizer)
        except RuntimeError as error:
            raise UserError(f"llama.cpp does not take {self.name}: {error}") from None

    def _fitting(self, ids: Ids, count: int, endpoint: Endpoint) -> Part:
        """The last tokens of a sequence that is too long; UserError where its continuation is."""
        room = endpoint.positions or len(ids)
        if count >= room:
            raise UserError(f"a choice has {count} tokens, and {self.name} takes {room}; shorten it")
        kept = ids[-room:]
        return Part(kept, len(kept) - count)

    def _check_ids(self, endpoint: Endpoint, largest: int) -> None:
        if (size := endpoint.vocab_size) is not None and largest >= size:
            raise UserError(f"the text has token {largest}, and {self.name} knows {size}; pass its own --tokenizer")


def _sequence(window: Sample) -> Ids:
    """The tokens of a window and the one that follows, where that is a label."""
    last = int(window.labels_L[-1])
    return (*window.input_ids_L.tolist(), *([] if last == IGNORE_INDEX else [last]))
