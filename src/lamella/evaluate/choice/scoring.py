"""Log-likelihoods of continuations. Whatever can give them can answer multiple choice: see `Scorer`.

Tokens are those of lm-evaluation-harness: context and continuation are encoded together, and the continuation is what
follows the tokens of the context alone; spaces at the context's end go to the continuation; an empty context is BOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lamella.errors import UserError
from lamella.evaluate.choice.shared_prefixes import Observer, TokenPair, log_likelihoods_of_tokens


class Likelihood(NamedTuple):
    """Of a continuation given its context."""

    nats: float
    """Its log-likelihood, summed over its tokens: at most 0."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one."""


class Scorer(Protocol):
    """A model of any kind: in this process, a GGUF file, or behind an HTTP endpoint."""

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """The likelihood of each (context, continuation), in their order."""
        ...


class ModelScorer:
    """A transformers model and its tokenizer as a `Scorer`."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, observe: Observer | None = None):
        """Take the model as it stands.

        Args:
            observe: called after each pass of the model, see `lamella.evaluate.choice.shared_prefixes.Observer`.
        """
        self.model, self.tokenizer, self.observe = model, tokenizer, observe

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """See `Scorer`.

        Raises:
            UserError: a continuation without tokens, or longer than the model's positions.
        """
        tokens = token_pairs(self.tokenizer, pairs)
        return [Likelihood(*row) for row in log_likelihoods_of_tokens(self.model, tokens, self.observe)]


def token_pairs(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[TokenPair]:
    """The ids of each (context, continuation).

    Raises:
        UserError: an empty continuation; an empty context for a tokenizer with neither BOS nor EOS.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    moved = []
    for context, continuation in pairs:
        bare = context.rstrip() if context.strip() else context
        moved.append((bare, context[len(bare) :] + continuation))
    wholes = _encode(tokenizer, [a + b for a, b in moved if a], prefix)
    contexts = _encode(tokenizer, [a for a, _ in moved if a], prefix)
    found = []
    for context, continuation in moved:
        if context:
            ids = contexts[context]
            found.append(TokenPair(ids, wholes[context + continuation][len(ids) :]))
        else:
            found.append(_without_context(tokenizer, continuation, prefix))
        if not found[-1].continuation:
            raise UserError(f"the continuation {continuation!r} of {context[-40:]!r} has no token of its own")
    return found


def _without_context(tokenizer: PreTrainedTokenizerBase, continuation: str, prefix: int | None) -> TokenPair:
    ids = tuple(tokenizer.encode(continuation, add_special_tokens=False))
    if prefix is None:
        raise UserError("the tokenizer has neither BOS nor EOS, so there is nothing before an empty context")
    return TokenPair(ids[:1], ids[1:]) if ids[:1] == (prefix,) else TokenPair((prefix,), ids)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prefix: int | None) -> dict[str, tuple[int, ...]]:
    """Each text once. One that already begins with BOS, spelt out, gets no second one."""
    begin = "" if prefix is None else str(tokenizer.decode([prefix]))
    groups: dict[bool, list[str]] = {True: [], False: []}
    for text in dict.fromkeys(texts):
        groups[not (begin and text.startswith(begin))].append(text)
    ids: dict[str, tuple[int, ...]] = {}
    for special, group in groups.items():
        if group:
            encoded = tokenizer(group, add_special_tokens=special)["input_ids"]
            ids |= {text: tuple(row) for text, row in zip(group, encoded, strict=True)}
    return ids
