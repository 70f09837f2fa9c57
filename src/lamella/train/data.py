"""Samples of several sources in one order, and the loader that gives each rank its share of them.

Sample i is a function of (seed, i) alone. Optimizer step t takes samples (t-1)*G up to t*G, on any number of ranks, so
the only state of the loader is the number of samples consumed.

Shapes: B samples, L tokens.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lamella.models.titan_device  # noqa: F401  before torchtitan

# isort: split
import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from lamella.data.order import Interleaving, Permutation
from lamella.data.packing import IGNORE_INDEX, PackedConversations, Sample, Samples, samples_of, token_file
from lamella.data.readers import Policy
from lamella.data.shards import BadData
from lamella.data.sources import Split, open_source
from lamella.errors import UserError
from lamella.recipe_sections import Portion

# One damaged shard is skipped; a folder that has gone is an error whatever the policy.
MAX_BAD_IN_A_ROW = 16
logger = logging.getLogger(__name__)


class MixedSamples:
    """The samples of several sources, interleaved by weight: in file order without a seed, else in an order drawn anew
    for each epoch of each source.

    Without weights a source has as many shares as it has samples, so that an epoch of all of them holds every sample
    once. Nothing is stored per sample: see `lamella.data.order`.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        seed: int | None = None,
        weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
        on_bad_data: Policy = "fail",
    ):
        self.sources, self.seed, self.on_bad_data = sources, seed, on_bad_data
        self.skipped = self._skipped_in_a_row = 0
        self.names = list(names) or [str(i) for i in range(len(sources))]
        self.interleaving = Interleaving(weights or [len(s) for s in sources], seed)
        self._orders: dict[tuple[int, int], Permutation] = {}

    def __len__(self) -> int:
        """Samples of all sources."""
        return sum(len(s) for s in self.sources)

    def sample(self, index: int) -> Sample:
        """Sample `index`, counted over epochs. By policy a sample of damaged data has nothing to predict.

        Raises:
            BadData: with the policy "fail", or when so many samples in a row are bad that the data must be gone.
        """
        source, position = self.locate(index)
        try:
            sample = self.sources[source].sample(position)
        except BadData as error:
            self.skipped += 1
            self._skipped_in_a_row += 1
            if self.on_bad_data == "fail" or self._skipped_in_a_row >= MAX_BAD_IN_A_ROW:
                raise
            logger.warning("sample %d has nothing to predict: %s", index, error)
            return nothing(cast(Any, self.sources[source]).seq_len)
        self._skipped_in_a_row = 0
        return sample

    def readable(self, source: int, position: int) -> Sample:
        """The sample at this place of a source; by policy, where it is damaged, one further on.

        Raises:
            BadData: see `sample`.
        """
        samples = self.sources[source]
        stride = len(samples) // MAX_BAD_IN_A_ROW + 1  # soon out of a damaged file
        *places, last = ((position + k * stride) % len(samples) for k in range(MAX_BAD_IN_A_ROW))
        for place in places:
            try:
                return samples.sample(place)
            except BadData as error:
                if self.on_bad_data == "fail":
                    raise
                logger.warning("another sample is taken: %s", error)
        return samples.sample(last)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, position in it) of sample `index`."""
        source, count = self.interleaving.place(index)
        epoch, position = divmod(count, len(self.sources[source]))
        return source, self._order(source, epoch)[position] if self.seed is not None else position

    def hashes(self) -> dict[str, str]:
        """Of the tokens of each source: with other ones, sample i is another."""
        return {name: source.tokens.hash for name, source in zip(self.names, self.sources, strict=True)}

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source has been gone through after so many samples."""
        counts = self.interleaving.counts(num_samples)
        return {n: c / len(s) for n, c, s in zip(self.names, counts, self.sources, strict=True)}

    def describe(self, num_samples: int) -> str:
        """What a run of so many samples takes of each source: its share of them, its epochs, and what is cut."""
        counts, parts = self.interleaving.counts(num_samples), []
        for name, count, samples in zip(self.names, counts, self.sources, strict=True):
            part = f"{name} {count / num_samples:.1%} of the samples, {count / len(samples):.2f} epochs"
            if num_cut := getattr(samples, "num_cut", 0):
                part += f", {num_cut} conversations longer than a sample are cut"
            parts.append(part)
        return "; ".join(parts)

    def num_before_exhaustion(self, at_most: int) -> int:
        """The most samples, up to `at_most`, of which no source gives one twice."""

        def repeats(num_samples: int) -> bool:
            counts = self.interleaving.counts(num_samples)
            return any(c > len(s) for c, s in zip(counts, self.sources, strict=True))

        return bisect_left(range(at_most + 1), True, key=repeats) - 1

    def _order(self, source: int, epoch: int) -> Permutation:
        if (source, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != source}
            self._orders[source, epoch] = Permutation(len(self.sources[source]), self.seed or 0, source, epoch)
        return self._orders[source, epoch]


def open_samples(
    portions: Sequence[Portion],
    split: Split,
    tokenizer: Path,
    seq_len: int,
    seed: int | None,
    num_samples: int,
    vocab_size: int,
    on_bad_data: Policy = "fail",
    at_least: int = 0,
) -> MixedSamples:
    """Tokenise the sources (or find them in the cache).

    Args:
        num_samples: what a run can use; of a streamed source no more is read.
        at_least: samples that are wanted of every source, whatever its weight.

    Raises:
        UserError: see `lamella.data.packing.token_file`; a tokenizer that does not belong to the model.
    """
    weights = [p.weight for p in portions if p.weight is not None]
    sources = []
    for i, portion in enumerate(portions):
        share = weights[i] / sum(weights) if weights else 1
        max_tokens = (max(math.ceil(num_samples * share), at_least) + 1) * seq_len + 1
        limit = max_tokens if open_source(portion.source).is_streamed else None
        tokens = token_file(portion.source, split, tokenizer, max_tokens=limit, on_bad_data=on_bad_data)
        if tokens.largest_id >= vocab_size:
            raise UserError(
                f"{portion.source} has the token id {tokens.largest_id}, but the model's vocabulary has {vocab_size} "
                f"ids; put the model's own tokenizer into {tokenizer}"
            )
        sources.append(samples_of(tokens, seq_len))
    return MixedSamples(sources, seed, weights, [p.source for p in portions], on_bad_data)


def steps_of_data(samples: MixedSamples, steps: int, samples_per_step: int, on_exhausted: str) -> int:
    """The steps of the run: fewer where the data end first and the policy is `stop`.

    Raises:
        UserError: the policy is `error` and a source would be gone through more than once; no whole step.
    """
    wanted = steps * samples_per_step
    available = samples.num_before_exhaustion(wanted)
    if on_exhausted == "repeat" or available == wanted:
        return steps
    epochs = ", ".join(f"{name} {count:.2f}" for name, count in samples.epochs(wanted).items() if count > 1)
    if on_exhausted == "stop" and available >= samples_per_step:
        return available // samples_per_step
    raise UserError(
        f"{steps} steps of {samples_per_step} samples would go through data more than once (epochs: {epochs}), enough "
        f"are there for {available // samples_per_step} steps; give more text, lower steps or set on_exhausted: repeat"
    )


def check_objective(objective: str, samples: MixedSamples) -> None:
    """UserError where a run with objective sft has no conversations to learn answers from."""
    if objective == "sft" and not any(isinstance(source, PackedConversations) for source in samples.sources):
        raise UserError(
            f"objective: sft learns the answers in conversations, and {', '.join(samples.names)} holds none; "
            "name a file whose records have messages"
        )


def spread(samples: MixedSamples, count: int) -> list[Sample]:
    """`count` samples (or all, if there are fewer): of each source its share, at even distances; by policy, where one
    is damaged, another."""
    shares = samples.interleaving.counts(min(count, len(samples)))
    sizes = [len(source) for source in samples.sources]
    parts = [(s, size, min(share, size)) for s, (size, share) in enumerate(zip(sizes, shares, strict=True))]
    return [samples.readable(s, i * size // share) for s, size, share in parts for i in range(share)]


def collate(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    """({"input" [B, L], "positions" [B, L]}, labels [B, L])."""
    ids_BL, labels_BL, positions_BL = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return {"input": ids_BL, "positions": positions_BL}, labels_BL


def blank(sample: Sample) -> Sample:
    """The sample with nothing to predict: fills the share of a rank that has no other."""
    return sample._replace(labels_L=torch.full_like(sample.labels_L, IGNORE_INDEX))


def nothing(seq_len: int) -> Sample:
    """A sample of token 0 with nothing to predict: stands for one that cannot be read."""
    zeros_L = torch.zeros(seq_len, dtype=torch.int64)
    return Sample(zeros_L, torch.full_like(zeros_L, IGNORE_INDEX), torch.arange(seq_len))


class SampleLoader(BaseDataLoader):
    """Endless micro-batches of one data-parallel rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        samples: Any = None  # MixedSamples, opened before the ranks meet

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: Any):
        self.samples: MixedSamples = config.samples
        self.dp_world_size, self.dp_rank, self.local_batch_size = dp_world_size, dp_rank, local_batch_size
        self.consumed = 0
        """Samples given out so far, over all ranks."""

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            first = self.consumed + self.dp_rank * self.local_batch_size
            indices = range(first, first + self.local_batch_size)
            self.consumed += self.dp_world_size * self.local_batch_size
            inputs, labels_BL = collate([self.samples.sample(i) for i in indices])
            # which text each sample is of, for losses that depend on it
            inputs["source"] = torch.tensor([self.samples.locate(i)[0] for i in indices])
            yield inputs, labels_BL

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_samples": self.consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed = state_dict["consumed_samples"]
