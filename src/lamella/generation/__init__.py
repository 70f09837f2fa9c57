"""Text from a model: any folder that lamella writes, or a dense model.

    for new_text in Generator.open("artifacts/moe").stream(["The capital of France is"]): ...

One token after another, in batches or in a conversation; what it took is counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lamella.errors import UserError, check_choice
from lamella.evaluate.checkpoints import DTYPES, model_path, open_checkpoint, parse_device
from lamella.generation.decoding import Decoding
from lamella.generation.drafts import (
    SELF,
    Draft,
    DraftCounts,
    LessOfItself,
    OtherModel,
    check_drafted,
    check_vocabulary,
    less_of,
    tokens_with_draft,
)
from lamella.generation.sampling import Sampling, next_tokens
from lamella.hf.offload import load_offloaded, parse_memory
from lamella.hf.packing import pack
from lamella.moe.matrices import PACKED_DTYPES

Message = dict[str, str]
"""One turn of a conversation: {"role": "user", "content": "..."}."""


@dataclass
class Counts:
    """What generating took."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    """Of all sequences."""
    prompt_s: float = 0.0
    """Until the first tokens."""
    decode_s: float = 0.0
    """From the first tokens to the last."""
    steps: int = 0
    """Decode steps: each gives every sequence of the batch a token. With a draft: tokens after the first."""
    draft: DraftCounts | None = None
    """Where a draft writes ahead."""

    @property
    def tokens_per_s(self) -> float:
        """Decode steps a second, the prompt left out: of one sequence, its tokens a second."""
        return self.steps / self.decode_s if self.decode_s else 0.0


@dataclass
class Generated:
    """The answer to one prompt."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    end: str = "length"
    """Why it ended: "eos", "stop" or "length"."""


def open_model(
    folder: str,
    dtype: str = "auto",
    device: str = "auto",
    expert_memory: str | None = None,
    experts_on: str = "disk",
    slices: str = "stored",
) -> PreTrainedModel:
    """A model for generating: a folder, a run directory, "embedded" or a hub name.

    Args:
        dtype: a name of `lamella.evaluate.checkpoints.DTYPES`, or int8; int8 and on a CPU float16 are of the weights
            alone, for kernels that read fewer bytes, and all else is computed in float32.
        expert_memory: a size such as "2GiB": the most of a converted model's experts that is in memory at a time.
        experts_on: where the others wait; see `lamella.hf.offload.load_offloaded`.
        slices: "int8" or "int4" keeps all frozen slices in memory in fewer bytes; see there, too.

    Raises:
        UserError: no such model, or one that the dtype does not hold.
    """
    check_choice("dtype", dtype, [*DTYPES, "int8"])
    device = parse_device(device)
    if expert_memory is not None:
        budget = parse_memory(expert_memory)
        if dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"experts on {experts_on} are not packed into {dtype}; use float32 or bfloat16")
        path = Path(model_path(folder))
        return load_offloaded(path, budget, experts_on, DTYPES[dtype], device, slices).requires_grad_(False)
    if slices != "stored":
        raise UserError("--slices is of experts that are not all in memory; give --expert-memory, too")
    packed = dtype == "int8" or (dtype == "float16" and device == "cpu")
    model = open_checkpoint(folder, "float32" if packed else dtype, device)
    if packed:
        pack(model, next(name for name in PACKED_DTYPES if name == dtype))
    return model


class Generator:
    """A model and its tokenizer, with what they have read: a conversation goes on from there."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.decoding = Decoding(model)
        self.draft: Draft | None = None
        self.ahead = 0
        """So many tokens does the draft write at a time."""
        self.counts = Counts()
        """Of the latest call."""

    @classmethod
    def open(
        cls, folder: str, dtype: str = "auto", device: str = "auto", expert_memory: str | None = None,
        experts_on: str = "disk", slices: str = "stored",
    ) -> Generator:  # fmt: skip
        """See `open_model`."""
        path = model_path(folder)
        model = open_model(path, dtype, device, expert_memory, experts_on, slices)
        return cls(model, AutoTokenizer.from_pretrained(path))

    def use_draft(self, name: str, ahead: int = 4, dtype: str = "auto") -> None:
        """Let a draft write ahead of the model, one prompt at a time; the text stays the model's own.

        Args:
            name: of a smaller model with the same tokenizer, as in `open`, or "self": the model with fewer experts.
            ahead: so many tokens are drafted at a time.
            dtype: of the draft that is another model, as in `open`.

        Raises:
            UserError: no such model, one with another vocabulary, or models that this cannot be done with.
        """
        if ahead < 1:
            raise UserError(f"draft tokens are {ahead}; at least 1 is drafted at a time")
        check_drafted(self.decoding, "the model")
        vocab_size = self.model.config.vocab_size
        if name == SELF:
            if dtype != "auto":
                raise UserError("the model drafts in its own dtype; leave the draft's out")
            self.draft = LessOfItself(self.decoding, *less_of(self.model), vocab_size)
        else:
            check_vocabulary(name, self.tokenizer)
            other = OtherModel(open_model(name, dtype, str(self.model.device)), vocab_size)
            check_drafted(other.decoding, f"the draft {name}")
            if other.decoding.context < self.decoding.context:
                raise UserError(
                    f"the draft {name} reads {other.decoding.context} tokens at most and the model "
                    f"{self.decoding.context}; give a draft that reads as many"
                )
            self.draft = other
        self.ahead = ahead

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """The tokens of a text, or of a conversation in the model's chat template, up to where the answer begins.

        Raises:
            UserError: a conversation for a model without a chat template.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt).input_ids)
        if not self.tokenizer.chat_template:
            raise UserError("the model has no chat template, so it holds no conversations; leave --chat out")
        text = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def stream(
        self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling | None = None
    ) -> Iterator[list[Generated]]:
        """The answers so far, after every token; the same objects each time, whose text grows.

        Raises:
            UserError: see `encode` and `Decoding.read`.
        """
        sampling = sampling or Sampling()
        encoded = [self.encode(prompt) for prompt in prompts]
        answers = [Generated() for _ in encoded]
        self.counts = Counts(prompt_tokens=sum(map(len, encoded)))
        ends, began = self._end_tokens(), time.perf_counter()
        generator = sampling.generator(self.model.device)
        room = min(sampling.max_tokens, self.decoding.context - max(map(len, encoded), default=0))
        open_rows = set(range(len(answers)))
        with torch.inference_mode():
            for step, tokens in enumerate(self._tokens(encoded, sampling, generator, room)):
                for row, token in enumerate(tokens):
                    if row in open_rows and self._append(answers[row], token, sampling, ends):
                        open_rows.discard(row)
                self._count(step, began, answers)
                yield answers
                if not open_rows:
                    return

    def _tokens(
        self, encoded: list[list[int]], sampling: Sampling, generator: torch.Generator, room: int
    ) -> Iterator[list[int]]:
        """The next token of each sequence, `room` times."""
        if self.draft is not None and len(encoded) > 1:
            raise UserError("a draft writes ahead of one prompt at a time; give one, or leave --draft out")
        logits_BV = self.decoding.read(encoded, sampling.max_tokens)
        if self.draft is not None:
            self.draft.read(encoded[0], sampling.max_tokens)
            self.counts.draft = DraftCounts()
            given = (self.decoding, self.draft, self.ahead, logits_BV, sampling, generator, room, self.counts.draft)
            yield from ([token] for token in tokens_with_draft(*given))
            return
        for step in range(room):
            tokens_B = next_tokens(logits_BV, sampling, generator)
            yield tokens_B.tolist()
            if step + 1 < room:
                logits_BV = self.decoding.next(tokens_B)

    def generate(self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling | None = None) -> list[Generated]:
        """The answers, when all of them are there."""
        *_, answers = self.stream(prompts, sampling)
        return answers

    def _append(self, answer: Generated, token: int, sampling: Sampling, ends: set[int]) -> bool:
        """Whether the answer has ended."""
        if token in ends and not sampling.ignore_eos:
            answer.end = "eos"
            return True
        answer.tokens.append(token)
        text = self.tokenizer.decode(answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        answer.text = text.rstrip("\ufffd")  # a letter whose last bytes are still to come
        found = [at for stop in sampling.stop if (at := text.find(stop)) >= 0]
        if found:
            answer.text, answer.end = text[: min(found)], "stop"
        return bool(found)

    def _count(self, step: int, began: float, answers: list[Generated]) -> None:
        now = time.perf_counter() - began
        counts = self.counts
        counts.new_tokens = sum(len(answer.tokens) for answer in answers)
        counts.steps = step
        if step == 0:
            counts.prompt_s = now
        counts.decode_s = now - counts.prompt_s

    def _end_tokens(self) -> set[int]:
        said = getattr(self.model.generation_config, "eos_token_id", None)
        ids = said if isinstance(said, list) else [said]
        return {int(i) for i in [*ids, self.tokenizer.eos_token_id] if isinstance(i, int)}
