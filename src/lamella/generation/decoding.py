"""Prompts into logits, one token after another, for any causal model of transformers.

Shapes: B sequences, L tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lamella.errors import UserError
from lamella.hf.decode import DecodeStep, has_step


class Decoding:
    """A model with what it has read so far."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.own_step = DecodeStep(model) if has_step(model) else None
        self._accepted = set(inspect.signature(model.forward).parameters)
        self.ids: list[int] = []
        """Of a single sequence: what is in the cache."""

    @property
    def context(self) -> int:
        """The most tokens that the model can read."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    def read(self, prompts: list[list[int]], max_tokens: int) -> Tensor:
        """The logits [B, V] after each prompt. Shorter prompts are padded in front.

        What a single prompt shares with what was read and written last is not computed again.

        Raises:
            UserError: a prompt that is empty, or that leaves no room for a token in the model's context.
        """
        longest = max(len(ids) for ids in prompts)
        if min(len(ids) for ids in prompts) == 0:
            raise UserError("a prompt is empty and the tokenizer begins no text by itself; write something")
        if longest + 1 > self.context:
            raise UserError(
                f"the prompt has {longest} tokens, but the model reads {self.context} at most, the answer among them; "
                "shorten it"
            )
        device, capacity = self.model.device, min(longest + max_tokens, self.context)
        cache, known = self._known(prompts)
        ids_BL = torch.tensor([[0] * (longest - len(ids)) + ids[known:] for ids in prompts], device=device)
        self.mask_BC = _mask(prompts, longest, capacity, device)
        self.length, self.ids = longest, prompts[0] if len(prompts) == 1 else []
        self.start_B = torch.tensor([longest - len(ids) for ids in prompts], device=device)
        positions_BL = (torch.arange(known, longest, device=device) - self.start_B[:, None]).clamp(min=0)
        logits_BV = self._forward(ids_BL, positions_BL, cache)
        if self.own_step is not None:
            self.own_step.start(cache, capacity)
        else:
            self.cache = cache
        return logits_BV

    def next(self, tokens_B: Tensor) -> Tensor:
        """The logits [B, V] after one more token of each sequence."""
        positions_B1, index = (self.length - self.start_B)[:, None], self.length
        self.length += 1
        if self.ids:
            self.ids = [*self.ids, int(tokens_B)]
        if self.own_step is not None:
            return self.own_step(tokens_B[:, None], index, positions_B1, self.mask_BC)
        return self._forward(tokens_B[:, None], positions_B1, self.cache)

    def several(self, tokens: list[int]) -> Tensor:
        """The logits [K, V] after each of K more tokens of a single sequence, in one pass."""
        if len(tokens) == 1:
            return self.next(torch.tensor(tokens, device=self.model.device))
        assert self.own_step is not None
        index = self.length
        self.length += len(tokens)
        self.ids = [*self.ids, *tokens]
        return self.own_step.several(torch.tensor(tokens, device=self.model.device)[:, None], index)

    def forget(self, count: int) -> None:
        """The newest tokens of a single sequence; what comes next takes their columns."""
        self.length -= count
        self.ids = self.ids[: self.length]

    def _known(self, prompts: list[list[int]]) -> tuple[DynamicCache, int]:
        """What is in memory of a single prompt, and how many tokens that is: at least one stays to be read."""
        known = 0
        if len(prompts) == 1 and self.own_step is not None and self.own_step.caches:
            known = sum(1 for _ in _shared(prompts[0][:-1], self.ids))
        if known and self.own_step is not None:
            return self.own_step.kept(known), known
        return DynamicCache(config=None if self.own_step is not None else self.model.config), 0

    def _forward(self, ids_BL: Tensor, positions_BL: Tensor, cache: DynamicCache) -> Tensor:
        given: dict[str, Any] = {"input_ids": ids_BL, "past_key_values": cache, "use_cache": True}
        if self.mask_BC is not None:
            given |= {"attention_mask": self.mask_BC[:, : self.length].long()}
        if "position_ids" in self._accepted:
            given |= {"position_ids": positions_BL}
        if "logits_to_keep" in self._accepted:
            given |= {"logits_to_keep": 1}
        return self.model(**given).logits[:, -1]


def _shared(one: list[int], other: list[int]) -> Iterator[int]:
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a


def _mask(prompts: list[list[int]], longest: int, capacity: int, device: torch.device) -> Tensor | None:
    """bool [B, capacity], false where a shorter prompt is padded; None where all are of one length."""
    if all(len(ids) == longest for ids in prompts):
        return None
    mask_BC = torch.ones(len(prompts), capacity, dtype=torch.bool, device=device)
    for row, ids in zip(mask_BC, prompts, strict=True):
        row[: longest - len(ids)] = False
    return mask_BC
