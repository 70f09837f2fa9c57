"""Log-probabilities of given tokens, from a server that was made to write others.

`Echo`: servers that repeat a prompt with its log-probabilities (`echo` and `logprobs` of /v1/completions), as vLLM
does. `Forced`: llama.cpp's server, which tells them of the tokens that it writes alone; so each token is forced, by a
bias beside which no other counts, and what is told is its probability before the bias. One pass for each token, then,
and as exact.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from lamella.errors import UserError
from lamella.evaluate.served.endpoint import Endpoint
from lamella.export.gguf import llama_cpp

AT_ONCE = 8  # requests to a server that batches them as it likes
FORCED = 1e6  # of log-odds: more than any logit is
LIKELIEST = 1000  # asked for before the whole vocabulary, which is megabytes of text
PROBE = "The quick brown fox jumps over 13 lazy dogs.\n"


class Scored(NamedTuple):
    """Of each token that was asked for."""

    nats: list[float]
    """Its log-probability."""
    greedy: list[bool]
    """Whether it is the likeliest one."""


class Part(NamedTuple):
    """A sequence, of whose tokens those from `first` on are asked for; `first` is at least 1."""

    ids: tuple[int, ...]
    first: int


class Dialect(Protocol):
    """A way to ask a server."""

    def score(self, parts: list[Part]) -> list[Scored]:
        """Of each part, in their order; UserError where the server refuses."""
        ...


def dialect_of(endpoint: Endpoint, tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """The one that the server understands.

    Raises:
        UserError: none; or the server's tokens are not those of this tokenizer.
    """
    dialect = Forced(endpoint) if endpoint.is_llama_cpp else Echo(endpoint)
    ids = tokenizer.encode(PROBE, add_special_tokens=False)
    if dialect.spelt(ids, PROBE) != PROBE:
        raise UserError(
            f"{endpoint.name} has other tokens than --tokenizer; pass the folder of the very model that it serves"
        )
    return dialect


class Echo:
    """See the module."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint

    def spelt(self, ids: list[int], text: str) -> str:
        """The text that the server takes the ids for, up to the length of `text`."""
        answer = self.endpoint.supports("/v1/completions", self._asked(tuple(ids)))
        try:
            self._logprobs(answer, len(ids))
            return str((answer or {})["choices"][0]["text"])[: len(text)]
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(
                f"{self.endpoint.name} tells no log-probabilities of a prompt (`echo` with `logprobs` in "
                "/v1/completions), which a measurement needs; serve the model with vLLM or llama.cpp, or measure its "
                "folder"
            ) from None

    def score(self, parts: list[Part]) -> list[Scored]:
        """See `Dialect`."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(self._score, parts))

    def _score(self, part: Part) -> Scored:
        answer = self.endpoint.post("/v1/completions", self._asked(part.ids))
        try:
            rows = self._logprobs(answer, len(part.ids))[part.first :]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(f"{self.endpoint.name} answers without the prompt's log-probabilities ({error})") from None
        return Scored([own for own, _ in rows], [own >= best for own, best in rows])

    def _asked(self, ids: tuple[int, ...]) -> dict:
        return {"model": self.endpoint.model, "prompt": list(ids), "max_tokens": 1, "temperature": 0} | {
            "echo": True,
            "logprobs": 1,
        }

    def _logprobs(self, answer: dict | None, count: int) -> list[tuple[float, float]]:
        """(of the token, of the likeliest one) at each of `count` places; the first token has none."""
        found = (answer or {})["choices"][0]["logprobs"]
        own, best = found["token_logprobs"], found["top_logprobs"]
        if len(own) < count + 1 or any(not isinstance(value, float | int) for value in own[1:count]):
            raise ValueError(f"{len(own)} figures for {count} tokens and one more")
        return [(-math.inf, 0.0)] + [
            (float(own[i]), max([float(own[i]), *map(float, best[i].values())])) for i in range(1, count)
        ]


class Forced:
    """See the module."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        self.slots = int((endpoint.get("/props") or {}).get("total_slots") or 1)

    def spelt(self, ids: list[int], text: str) -> str:
        """The text that the server takes the ids for."""
        return str(self.endpoint.post("/detokenize", {"tokens": ids}).get("content"))

    def score(self, parts: list[Part]) -> list[Scored]:
        """See `Dialect`; parts that begin alike are computed one after the other in one slot."""
        order, count = sorted(range(len(parts)), key=lambda i: parts[i].ids), len(parts)
        found: dict[int, Scored] = {}

        def share(slot: int) -> None:
            for i in order[count * slot // self.slots : count * (slot + 1) // self.slots]:
                found[i] = self._score(parts[i], slot)

        with ThreadPoolExecutor(self.slots) as pool:
            list(pool.map(share, range(self.slots)))
        return [found[i] for i in range(count)]

    def _score(self, part: Part, slot: int) -> Scored:
        rows = [self._token(part.ids[:at], part.ids[at], slot) for at in range(part.first, len(part.ids))]
        return Scored([nats for nats, _ in rows], [greedy for _, greedy in rows])

    def _token(self, prompt: tuple[int, ...], token: int, slot: int) -> tuple[float, bool]:
        """(its log-probability, whether it is the likeliest) after the prompt."""
        post, told = self.endpoint.post, llama_cpp.drawn(self.endpoint.post, [*prompt], 1, [token, FORCED], slot)
        if told is not None:
            if told["id"] != token:
                raise UserError(f"{self.endpoint.name} draws token {told['id']} where {token} is forced")
            return float(told["logprob"]), told["top_logprobs"][0]["id"] == token
        for count in (LIKELIEST, llama_cpp.WHOLE_VOCABULARY):
            found = llama_cpp.candidates(post, [*prompt], count, slot)
            if token in found:
                return found[token], next(iter(found)) == token
        return -math.inf, False
