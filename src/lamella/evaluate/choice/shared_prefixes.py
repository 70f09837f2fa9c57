"""Log-likelihoods of tokens, where what continuations share is computed once.

A context is computed once for all its continuations, and what many contexts begin with (examples before a question)
once for all of them: their keys and values are kept and copied. Contexts of a batch are cut at the length of the
shortest, so that no padding stands before a token: every model that has a cache gives its own logits.

Shapes: R rows (sequences) of a pass, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lamella.errors import UserError

Ids: TypeAlias = tuple[int, ...]
Observer: TypeAlias = Callable[[list[int], list[int]], None]
"""(for each row of the pass that has just been computed, the number of the pair that it belongs to; its real tokens).
Rows are padded at their end to the longest."""
TOKENS_PER_PASS = 4096
CACHED_TOKENS = 32768
"""At most so many keys and values of each layer: 4 GiB of Llama 3.1 8B's."""
LOGIT_BYTES = 512 << 20
"""At most this much memory for the logits of a pass, in float32."""
HEAD = 64
"""Contexts that agree in this many first tokens are computed together."""
MIN_HEAD = 32
"""A beginning that contexts share is computed by itself from this many tokens on."""


class TokenPair(NamedTuple):
    """A context and its continuation; both have tokens."""

    context: Ids
    continuation: Ids


@dataclass
class Row:
    """A sequence that the model reads: a context, and its continuation but for the last token."""

    ids: Ids
    asked: list[tuple[int, Ids]] = field(default_factory=list)
    """(number of the pair, continuation): the likelihoods that this row answers."""


@dataclass
class Batch:
    """Contexts with their rows; all contexts are at least `cut` + 1 tokens long."""

    contexts: list[tuple[Ids, list[Row]]]

    @property
    def cut(self) -> int:
        """Tokens of each context that are computed once for its rows; 0 where no context has two."""
        if all(len(rows) == 1 for _, rows in self.contexts) and not self.head:
            return 0
        return min(len(context) for context, _ in self.contexts) - 1

    @property
    def head(self) -> int:
        """Tokens that all contexts begin with, if they are many enough to be computed by themselves."""
        if len(self.contexts) == 1:
            return 0
        first, last = min(c for c, _ in self.contexts), max(c for c, _ in self.contexts)
        shortest = min(len(first), len(last)) - 1
        shared = next((i for i in range(shortest) if first[i] != last[i]), shortest)
        return shared if shared >= MIN_HEAD else 0

    @property
    def rows(self) -> list[Row]:
        """The rows of all contexts."""
        return [row for _, rows in self.contexts for row in rows]


@torch.inference_mode()
def log_likelihoods_of_tokens(
    model: PreTrainedModel, pairs: Sequence[TokenPair], observe: Observer | None = None
) -> list[tuple[float, bool]]:
    """(log-likelihood in nats, whether it is what greedy decoding gives) of each continuation.

    What is longer than the model's positions loses its first tokens.

    Raises:
        UserError: a continuation that is longer than the model's positions.
    """
    found: dict[int, tuple[float, bool]] = {}
    for batch in _batches(_rows_by_context(pairs, _longest(model)), model.config.vocab_size):
        found.update(_score(model, batch, observe))
    return [found[number] for number in range(len(pairs))]


def _longest(model: PreTrainedModel) -> int:
    longest = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    return longest or 1 << 30


def _rows_by_context(pairs: Sequence[TokenPair], longest: int) -> dict[Ids, list[Row]]:
    """Pairs that are the same but for the last token share a row: choices that are single letters need one."""
    found: dict[Ids, dict[Ids, Row]] = defaultdict(dict)
    for number, (context, continuation) in enumerate(pairs):
        if len(continuation) > longest:
            raise UserError(f"a choice has {len(continuation)} tokens, and the model {longest} positions; shorten it")
        read = (context + continuation)[-longest - 1 : -1]
        kept = read[: len(read) - len(continuation) + 1]
        row = found[kept].setdefault(read, Row(read))
        row.asked.append((number, continuation))
    return {context: list(rows.values()) for context, rows in found.items()}


def _batches(rows_by_context: dict[Ids, list[Row]], vocab_size: int) -> Iterator[Batch]:
    """Contexts of one beginning, by length; as many as fit in a pass and are about as long."""
    most_logits = LOGIT_BYTES // (4 * vocab_size)
    heads = Counter(context[:HEAD] for context in rows_by_context if len(context) > HEAD)

    def order(context: Ids) -> tuple[Ids, int]:
        head = context[:HEAD]
        return (head if heads[head] > 1 else ()), len(context)

    batch, begin = Batch([]), None
    for context in sorted(rows_by_context, key=order):
        rows = rows_by_context[context]
        grown = Batch([*batch.contexts, (context, rows)])
        if batch.contexts and (order(context)[0] != begin or not _fits(grown, most_logits)):
            yield batch
            grown = Batch([(context, rows)])
        batch, begin = grown, order(context)[0]
    if batch.contexts:
        yield batch


def _fits(batch: Batch, most_logits: int) -> bool:
    """Whether it is small enough, and little is computed twice or for padding."""
    lengths = [len(context) for context, _ in batch.contexts]
    longest, cut = max(len(row.ids) for row in batch.rows), batch.cut
    last_pass = len(batch.rows) * (longest - cut)
    slack = min(lengths) // 16 if cut else min(lengths) // 4
    return (
        max(last_pass, len(lengths) * (cut - batch.head)) <= TOKENS_PER_PASS
        and last_pass <= most_logits
        and len(batch.rows) * longest <= CACHED_TOKENS
        and max(lengths) - min(lengths) <= max(slack, 1)
    )


def _score(model: PreTrainedModel, batch: Batch, observe: Observer | None) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(number of the pair, its figures) of every pair in the batch."""
    rows, cut, cache = batch.rows, batch.cut, None
    if cut:
        cache = _computed_contexts(model, batch, observe)
        owners = [index for index, (_, rows) in enumerate(batch.contexts) for _ in rows]
        cache.batch_select_indices(torch.tensor(owners, device=model.device))
    tails = [row.ids[cut:] for row in rows]
    logits_RLV = _pass(model, tails, cache, [row.asked[0][0] for row in rows], observe)[0]
    for row, tail, logits_LV in zip(rows, tails, logits_RLV, strict=True):
        for number, continuation in row.asked:
            yield number, _likelihood(logits_LV[len(tail) - len(continuation) : len(tail)], continuation)


def _likelihood(logits_LV: Tensor, continuation: Ids) -> tuple[float, bool]:
    """Figures of a continuation of L tokens, each predicted by the logits at its place."""
    log_p_LV = logits_LV.float().log_softmax(-1)
    ids_L = torch.tensor(continuation, device=log_p_LV.device)
    chosen_L = log_p_LV.gather(-1, ids_L[:, None])[:, 0]
    return chosen_L.sum().item(), bool((log_p_LV.argmax(-1) == ids_L).all())


def _computed_contexts(model: PreTrainedModel, batch: Batch, observe: Observer | None) -> Cache:
    """The keys and values of the first `batch.cut` tokens of each context; what all begin with is computed once."""
    numbers = [rows[0].asked[0][0] for _, rows in batch.contexts]
    head, cache = batch.head, None
    if head:
        _, cache = _pass(model, [batch.contexts[0][0][:head]], None, numbers[:1], observe, keep=1)
        cache.batch_select_indices(torch.zeros(len(numbers), dtype=torch.long, device=model.device))
    if cache is None or batch.cut > head:
        middles = [context[head : batch.cut] for context, _ in batch.contexts]
        _, cache = _pass(model, middles, cache, numbers, observe, keep=1)
    return cache


def _pass(
    model: PreTrainedModel,
    rows: list[Ids],
    cache: Cache | None,
    numbers: list[int],
    observe: Observer | None,
    keep: int = 0,
) -> tuple[Tensor, Cache]:
    """(logits [R, L, V] or those of the last `keep` places, the cache) of rows that follow what the cache holds."""
    longest = max(len(row) for row in rows)
    ids_RL = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=model.device)
    uses_cache = cache is not None or keep > 0
    out = model(ids_RL, past_key_values=cache, use_cache=uses_cache, logits_to_keep=keep)
    if observe is not None:
        observe(numbers, [len(row) for row in rows])
    return out.logits, out.past_key_values
