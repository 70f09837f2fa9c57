"""The steps by which adapters and their routers train: what one reads, its loss, its rate, and where to go on from.

The dense weights stay as they are, so a step is a forward pass and a backward pass for activations alone, in one
process. Samples are packed windows of text; what a step reads depends on the seed and its number alone, so a training
that goes on from a file ends with the bits of one that was never interrupted.

Shapes: B samples, L tokens of each, T = B*L tokens, C tokens of a chunk, D model width, V vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lamella.data.packing import IGNORE_INDEX, PackedSamples, token_file
from lamella.data.sources import open_source
from lamella.errors import UserError
from lamella.evaluate.checkpoints import model_path
from lamella.moe.learning import rate_at

LEAST_RATE = 0.1
"""Of the largest rate: the cosine falls to this."""
TOKENS_PER_CHUNK = 128
"""Tokens whose logits exist at a time: with 49,152 float32 logits a token, 24 MiB. Above 32 MiB glibc maps fresh pages
for every buffer, which took 77 ms of a step of 0.9 s."""
Groups = list[dict[str, object]]
"""Parameters and their rates, as torch's optimizers take them."""


@dataclass(frozen=True)
class Pace:
    """How long and how fast to train."""

    steps: int = 60
    lr: float = 1e-3
    samples_per_step: int = 4
    seq_len: int = 256
    seed: int = 0
    skip: int = 0
    """Samples of each text that are passed over, since others have read them."""
    falls: bool = True
    """Whether the rate falls in the end; not where other trainings begin with what this one has learned."""

    def __post_init__(self) -> None:
        for name in ("steps", "samples_per_step", "seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr is {self.lr}; it must be a positive number")

    @property
    def tokens_per_step(self) -> int:
        return self.samples_per_step * self.seq_len

    def factor(self, step: int) -> float:
        """The share of `lr` at a step, from 0."""
        return rate_at(step, self.steps, LEAST_RATE if self.falls else 1.0)

    def samples_of_each(self, num_texts: int) -> int:
        """The most samples that all steps read of one text."""
        return -(-self.steps * self.samples_per_step // num_texts)


class StopAskedError(Exception):
    """Somebody asked the training to stop; what it has is in its file."""


class Kept(NamedTuple):
    """Where a training that may be interrupted goes on from."""

    file: Path
    every: int
    """The file is written after so many steps."""
    asked: Callable[[], bool] = lambda: False
    """Whether to stop now."""


class Step(NamedTuple):
    """What is known of a step before its loss is asked for."""

    texts_B: Tensor
    """The number of each sample's text."""
    ids_BL: Tensor
    labels_BL: Tensor


def samples_of(source: str, model: str, pace: Pace, num_texts: int = 1) -> PackedSamples:
    """The training part of a text in windows; of a streamed one, as much as all steps could read."""
    limit = None
    if open_source(source).is_streamed:
        limit = (pace.skip + pace.samples_of_each(num_texts)) * pace.seq_len + 1
    return PackedSamples(token_file(source, "train", model_path(model), max_tokens=limit), pace.seq_len, pace.seed)


def read_step(texts: Sequence[PackedSamples], pace: Pace, step: int) -> Step:
    """The samples of a step, from 0: the texts take turns."""
    first = step * pace.samples_per_step
    numbers = range(first, first + pace.samples_per_step)
    drawn = [texts[number % len(texts)].sample(pace.skip + number // len(texts)) for number in numbers]
    return Step(
        torch.tensor([number % len(texts) for number in numbers]),
        torch.stack([sample.input_ids_L for sample in drawn]),
        torch.stack([sample.labels_L for sample in drawn]),
    )


def take_steps(
    model: PreTrainedModel,
    texts: Sequence[PackedSamples],
    pace: Pace,
    groups: Groups,
    additions: Callable[[Tensor], Tensor | None] = lambda _: None,
    kept: Kept | None = None,
    on_step: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Train; the loss of each step that this call has taken, nats per token.

    Args:
        additions: to the loss of the step whose texts have these numbers.
        on_step: told a finished step's number, from 1, and its loss.

    Raises:
        UserError: the loss stopped being a number.
        StopAskedError: see `Kept.asked`.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    done, losses = 0 if kept is None else _go_on(kept.file, parameters, optimizer), []
    for number in range(done + 1, pace.steps + 1):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * pace.factor(number - 1)
        step = Step(*(tensor.to(model.device) for tensor in read_step(texts, pace, number - 1)))
        loss = mean_nats(model, step.ids_BL, step.labels_BL)
        if not loss.isfinite():
            raise UserError(f"the training failed at step {number}: the loss is {loss.item()}; lower lr ({pace.lr})")
        more = additions(step.texts_B)
        (loss if more is None else loss + more).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if kept is not None and number < pace.steps and number % kept.every == 0:
            _keep(kept.file, number, parameters, optimizer)
        losses.append(loss.item())
        on_step(number, losses[-1])
        if kept is not None and number < pace.steps and kept.asked():
            _keep(kept.file, number, parameters, optimizer)
            raise StopAskedError
    return losses


def mean_nats(model: PreTrainedModel, ids_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """The mean cross-entropy of the labels, the logits of a few tokens at a time."""
    hidden_TD = model.get_decoder()(ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)
    head, labels_T = model.get_output_embeddings(), labels_BL.flatten()
    total = hidden_TD.new_zeros((), dtype=torch.float32)
    for hidden_CD, labels_C in zip(hidden_TD.split(TOKENS_PER_CHUNK), labels_T.split(TOKENS_PER_CHUNK), strict=True):
        total = total + checkpoint(_summed_nats, head, hidden_CD, labels_C, use_reentrant=False)
    return total / (labels_T != IGNORE_INDEX).sum().clamp(min=1)


def _summed_nats(head: nn.Module, hidden_CD: Tensor, labels_C: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden_CD).float(), labels_C, ignore_index=IGNORE_INDEX, reduction="sum")


def _keep(file: Path, step: int, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Replace the file whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    state = {"step": step, "parameters": [p.data for p in parameters], "optimizer": optimizer.state_dict()}
    torch.save(state, temporary)
    temporary.replace(file)


def _go_on(file: Path, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Take what the file holds; the steps that are done."""
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True)
    for parameter, stored in zip(parameters, state["parameters"], strict=True):
        parameter.data.copy_(stored)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])
