"""Speculative decoding: a draft writes a few tokens, the model reads them in one pass and keeps those it would write.

Leviathan et al., arXiv 2211.17192. The text is the model's own: greedy, its likeliest tokens; drawn, tokens of its
distribution. transformers' assisted generation computes the same in a loop of its own, which refuses a cache of a fixed
size and so cannot use the step of `lamella.hf.decode`.

Shapes: K drafted tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lamella.errors import UserError
from lamella.evaluate.checkpoints import has_moe_layers, model_path
from lamella.generation.decoding import Decoding
from lamella.generation.sampling import Sampling, next_tokens, probabilities
from lamella.hf.computing import Computing

SELF = "self"
"""Stands for the model itself, computing less."""


@dataclass
class DraftCounts:
    """What a draft was good for."""

    passes: int = 0
    """Of the model, each over a draft."""
    drafted: int = 0
    """Tokens that the draft wrote."""
    accepted: int = 0
    """Those that the model kept."""

    def told(self) -> str:
        """In words."""
        rate = self.accepted / self.drafted if self.drafted else 0.0
        per_pass = (self.accepted + self.passes) / self.passes if self.passes else 0.0
        return f"{self.accepted} of {self.drafted} drafted tokens kept ({rate:.0%}): {per_pass:.2f} tokens a step"


@dataclass
class Guess:
    """What a draft wrote, and the logits [K, V] that it drew each token from."""

    tokens: list[int]
    logits_KV: Tensor


class Draft(Protocol):
    """Who writes ahead of a model."""

    def read(self, prompt: list[int], max_tokens: int) -> None:
        """A prompt, which the model has read."""

    def propose(self, token: int, count: int, sampling: Sampling, generator: torch.Generator) -> Guess:
        """Up to `count` tokens after `token`, the model's latest."""

    def settle(self, accepted: int) -> None:
        """So many tokens of the latest guess were kept."""


class OtherModel:
    """A draft that is a model of its own, with what it has read."""

    def __init__(self, model: PreTrainedModel, vocab_size: int):
        self.decoding, self.vocab_size = Decoding(model), vocab_size
        """The vocabulary of the model that it drafts for, which may be padded to another size."""
        self.unread: list[int] = []
        """What the model has read or written and the draft has not."""
        self.guessed: list[int] = []

    def read(self, prompt: list[int], max_tokens: int) -> None:
        self.decoding.read([prompt], max_tokens)
        self.unread, self.guessed = [], []

    def propose(self, token: int, count: int, sampling: Sampling, generator: torch.Generator) -> Guess:
        # an id that is there to round up the model's vocabulary means nothing to the draft, which may have fewer
        self.unread.append(min(token, self.decoding.model.config.vocab_size - 1))
        self.guessed, logits_KV = _write(self.decoding, self.unread, count, sampling, generator, self.vocab_size)
        if self.guessed:
            self.unread = self.guessed[-1:]  # written, but not read
        return Guess(self.guessed, logits_KV)

    def settle(self, accepted: int) -> None:
        if accepted < len(self.guessed):
            self.decoding.forget(len(self.guessed) - 1 - accepted)
            self.unread = []


class LessOfItself:
    """A draft that is the model itself with fewer experts. Its keys and values are the model's, and its own go."""

    def __init__(self, decoding: Decoding, computing: Computing, less: Computing, vocab_size: int):
        self.decoding, self.computing, self.less, self.vocab_size = decoding, computing, less, vocab_size

    def read(self, prompt: list[int], max_tokens: int) -> None:
        """The model has read it."""

    def propose(self, token: int, count: int, sampling: Sampling, generator: torch.Generator) -> Guess:
        with self.computing.temporarily(self.less):
            tokens, logits_KV = _write(self.decoding, [token], count, sampling, generator, self.vocab_size)
        self.decoding.forget(len(tokens))  # it has read the model's token, but not its own last one
        return Guess(tokens, logits_KV)

    def settle(self, accepted: int) -> None:
        """It keeps nothing."""


def _write(
    decoding: Decoding, unread: list[int], count: int, sampling: Sampling, generator: torch.Generator, vocab_size: int
) -> tuple[list[int], Tensor]:
    """(`count` tokens after those that are unread, the logits [count, vocab_size] each was drawn from)."""
    tokens: list[int] = []
    logits = []
    for _ in range(count):
        logits_1V = decoding.several(unread if not tokens else tokens[-1:])[-1:, :vocab_size]
        logits.append(F.pad(logits_1V, (0, vocab_size - logits_1V.shape[-1]), value=-torch.inf))
        tokens.append(int(next_tokens(logits[-1], sampling, generator)))
    return tokens, torch.cat(logits) if logits else torch.empty(0, vocab_size)


def tokens_with_draft(
    decoding: Decoding, draft: Draft, ahead: int, logits_1V: Tensor, sampling: Sampling, generator: torch.Generator,
    room: int, counts: DraftCounts,
) -> Iterator[int]:  # fmt: skip
    """The `room` next tokens of a single sequence.

    Args:
        decoding: of the model, which has read the prompt.
        draft: has read it, too.
        ahead: so many tokens are drafted at a time.
        logits_1V: after the prompt.
    """
    token = int(next_tokens(logits_1V, sampling, generator))
    yield token
    room -= 1
    while room:
        guess = draft.propose(token, min(ahead, room - 1), sampling, generator)
        logits_KV = decoding.several([token, *guess.tokens])
        accepted, token = keep(guess, logits_KV, sampling, generator)
        decoding.forget(len(guess.tokens) - accepted)
        draft.settle(accepted)
        counts.passes += 1
        counts.drafted += len(guess.tokens)
        counts.accepted += accepted
        room -= accepted + 1
        yield from guess.tokens[:accepted]
        yield token


def keep(guess: Guess, logits_KV: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, int]:
    """(how many of the guess's tokens are kept, the token after them), so that all are as if drawn from the model.

    Args:
        logits_KV: the model's, [K + 1, V]: before each token of the guess and after the last.
    """
    if sampling.temperature == 0:
        likeliest = logits_KV.argmax(dim=-1).tolist()
        accepted = 0
        while accepted < len(guess.tokens) and guess.tokens[accepted] == likeliest[accepted]:
            accepted += 1
        return accepted, likeliest[accepted]
    wanted_KV = probabilities(logits_KV, sampling)
    drawn_KV = probabilities(guess.logits_KV.to(logits_KV.device), sampling)
    chances = torch.rand(len(guess.tokens), generator=generator, device=logits_KV.device).tolist()
    for k, token in enumerate(guess.tokens):
        if chances[k] * float(drawn_KV[k, token]) < float(wanted_KV[k, token]):
            continue
        missing_V = (wanted_KV[k] - drawn_KV[k]).clamp(min=0)
        return k, int(torch.multinomial(missing_V if missing_V.any() else wanted_KV[k], 1, generator=generator))
    return len(guess.tokens), int(torch.multinomial(wanted_KV[-1], 1, generator=generator))


def less_of(model: PreTrainedModel) -> tuple[Computing, Computing]:
    """(what the model's layers hold, the same with half of the experts per token, or of twins the slices alone).

    Raises:
        UserError: a model that cannot compute less.
    """
    if not has_moe_layers(model):
        raise UserError(f"the model has no experts of lamella's to leave out; give --draft DIR instead of {SELF!r}")
    now, layers = model.computing, model.moe_layers
    if any(layer.config.routing == "twin" for layer in layers):
        if now.twin_share == 0:
            raise UserError(f"without twins the model computes no less than that; leave --draft {SELF} or --twins out")
        return now, dataclasses.replace(now, twin_share=0.0)
    top_k = min(now.applied(layer.config).num_experts_per_tok for layer in layers) // 2
    if top_k == 0:
        raise UserError(f"a token takes one expert already, so the model computes no less; leave --draft {SELF} out")
    return now, dataclasses.replace(now, top_k=top_k)


def check_drafted(decoding: Decoding, whose: str) -> None:
    """UserError for a model that cannot read several tokens at once and forget some."""
    if decoding.own_step is None:
        raise UserError(
            f"{whose} is no model of Llama's layers, dense or converted, without attention experts or adapters, "
            "as --draft needs; leave it out"
        )


def check_vocabulary(name: str, ours: PreTrainedTokenizerBase) -> None:
    """UserError unless the draft's tokenizer has the model's tokens."""
    path = model_path(name)
    try:
        theirs = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"the tokenizer of the draft {name} cannot be read: {reason}") from None
    if theirs.get_vocab() != ours.get_vocab():
        raise UserError(
            f"the draft {name} has another vocabulary ({len(theirs):,} tokens) than the model ({len(ours):,}); "
            "give a draft with the model's own tokenizer"
        )
