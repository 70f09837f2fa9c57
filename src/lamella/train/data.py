"""Samples of several sources in one order, and the loader that gives each rank its share of them.

Sample i is a function of (seed, i) alone. Optimizer step t takes samples (t-1)*G up to t*G, on any number of ranks, so
the state of the loader is the number of samples consumed, and of each stream the place that this number means.

Shapes: B samples, L tokens.
"""

from __future__ import annotations

import json
import logging
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader

from lamella.data.order import Interleaving, Permutation
from lamella.data.packing import IGNORE_INDEX, PackedConversations, Sample, Samples, samples_of, token_file
from lamella.data.readers import Policy
from lamella.data.sources import Split, open_source
from lamella.data.streaming import Ranks, StreamedSamples, StreamState
from lamella.data.tokenizer import check_vocabulary
from lamella.errors import BadData, UserError
from lamella.jsons import Json
from lamella.recipe.sections import Portion
from lamella.train.prefetch import Prefetch

# One damaged shard is skipped; a folder that has gone is an error whatever the policy.
MAX_BAD_IN_A_ROW = 16
logger = logging.getLogger(__name__)


class MixedSamples:
    """The samples of several sources, interleaved by weight: in file order without a seed, else in an order drawn anew
    for each epoch of each source. Streams keep their own order.

    Without weights a source has as many shares as it has samples, so that an epoch of all of them holds every sample
    once. Nothing is stored per sample: see `lamella.data.order`.
    """

    def __init__(
        self,
        sources: Sequence[Samples | StreamedSamples],
        seed: int | None = None,
        weights: Sequence[float] | None = None,
        names: Sequence[str] = (),
        on_bad_data: Policy = "fail",
    ):
        self.sources, self.seed, self.on_bad_data = sources, seed, on_bad_data
        self.skipped = self._skipped_in_a_row = 0
        self.places: list[StreamState] | None = None
        """Of the streams, where the run is; None: where they are."""
        self.names = list(names) or [str(i) for i in range(len(sources))]
        self.streams = {i: s for i, s in enumerate(sources) if isinstance(s, StreamedSamples)}
        self.sized = {i: s for i, s in enumerate(sources) if not isinstance(s, StreamedSamples)}
        self.interleaving = Interleaving(weights or [len(s) for s in self.sized.values()] or [1], seed)
        self._orders: dict[tuple[int, int], Permutation] = {}

    def __len__(self) -> int:
        """Samples of all sources but streams."""
        return sum(len(s) for s in self.sized.values())

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
            return nothing(self.sources[source].seq_len)
        self._skipped_in_a_row = 0
        return sample

    def readable(self, source: int, position: int) -> Sample:
        """The sample at this place of a source; by policy, where it is damaged, one further on.

        Raises:
            BadData: see `sample`.
        """
        samples = self.sized[source]
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
        """Where sample `index` is: (source, position in it)."""
        source, count = self.interleaving.place(index)
        if source in self.streams:
            return source, count
        epoch, position = divmod(count, len(self.sized[source]))
        return source, self._order(source, epoch)[position] if self.seed is not None else position

    def hashes(self) -> dict[str, str]:
        """The hash of each source's text: with another text, sample i is another."""
        return {name: source.hash for name, source in zip(self.names, self.sources, strict=True)}

    def epochs(self, num_samples: int) -> dict[str, float]:
        """How often each source has been gone through after so many samples; of a stream, until now."""
        counts = self.interleaving.counts(num_samples)
        places = self.places or [stream.state for stream in self.streams.values()]
        done = {i: s.passes(place) for (i, s), place in zip(self.streams.items(), places, strict=True)}
        done |= {i: counts[i] / len(source) for i, source in self.sized.items()}
        return {name: done[i] for i, name in enumerate(self.names)}

    def describe(self, num_samples: int) -> str:
        """What a run of so many samples takes of each source: its share of them, its epochs, and what is cut."""
        counts, parts = self.interleaving.counts(num_samples), []
        for i, (name, count) in enumerate(zip(self.names, counts, strict=True)):
            samples = self.sized.get(i)
            epochs = "streamed" if samples is None else f"{count / len(samples):.2f} epochs"
            part = f"{name} {count / num_samples:.1%} of the samples, {epochs}"
            if num_cut := getattr(samples, "num_cut", 0):
                part += f", {num_cut} conversations longer than a sample are cut"
            if left_out := getattr(getattr(samples, "tokens", None), "left_out", ""):
                part += f", {left_out}"
            parts.append(part)
        return "; ".join(parts)

    def num_before_exhaustion(self, at_most: int) -> int:
        """The most samples, up to `at_most`, of which no source but a stream gives one twice."""

        def repeats(num_samples: int) -> bool:
            counts = self.interleaving.counts(num_samples)
            return any(counts[i] > len(source) for i, source in self.sized.items())

        return bisect_left(range(at_most + 1), True, key=repeats) - 1

    def read_ahead(self, num_samples: int) -> None:
        """Let all streams read the text of the first so many samples, as all ranks do together."""
        counts = self.interleaving.counts(num_samples)
        for i, stream in self.streams.items():
            stream.read_ahead(counts[i])

    def advance(self, num_samples: int) -> list[StreamState]:
        """The place of each stream behind so many samples of the mixture, the same on every rank.

        A rank has taken its own samples, the last of which may lie before.
        """
        counts = self.interleaving.counts(num_samples)
        for i, stream in self.streams.items():
            with suppress(*([BadData] if self.on_bad_data == "skip" else [])):  # the next sample tries again
                stream.advance(counts[i])
        return [stream.state for stream in self.streams.values()]

    def given_out(self, places: list[StreamState]) -> None:
        """Take note that the run has come to these places; the streams may be ahead of them."""
        self.places = places

    def stream_states(self, places: list[StreamState]) -> str:
        """JSON of places of the streams."""
        return json.dumps([stream.state_dict(p) for stream, p in zip(self.streams.values(), places, strict=True)])

    def load_stream_states(self, states: str) -> None:
        """Go on behind the places that `stream_states` told."""
        for stream, state in zip(self.streams.values(), json.loads(states), strict=True):
            stream.load_state_dict(state)
        self.places = None

    def _order(self, source: int, epoch: int) -> Permutation:
        if (source, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != source}
            self._orders[source, epoch] = Permutation(len(self.sized[source]), self.seed or 0, source, epoch)
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
    """Tokenise the sources (or find them in the cache), or begin to stream those of the training part that want it.

    Args:
        num_samples: what a run can use; of a source that is streamed, or a `datasets` name, no more is kept.
        at_least: samples that are wanted of every source, whatever its weight.

    Raises:
        UserError: see `lamella.data.packing.token_file`; a tokenizer that does not belong to the model.
    """
    weights = [p.weight for p in portions if p.weight is not None]
    sources: list[Samples | StreamedSamples] = []
    for i, portion in enumerate(portions):
        if portion.stream and split == "train":
            stream = StreamedSamples(
                portion.source, split, tokenizer, seq_len, vocab_size=vocab_size, on_bad_data=on_bad_data
            )
            sources.append(stream)
            continue
        share = weights[i] / sum(weights) if weights else 1
        max_tokens = (max(math.ceil(num_samples * share), at_least) + 1) * seq_len + 1
        limit = max_tokens if portion.stream or open_source(portion.source).is_streamed else None
        tokens = token_file(portion.source, split, tokenizer, max_tokens=limit, on_bad_data=on_bad_data)
        check_vocabulary(portion.source, tokens.largest_id, vocab_size, tokenizer)
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


def has_label(sample: Sample) -> bool:
    """Whether there is anything to predict in it."""
    return bool((sample.labels_L != IGNORE_INDEX).any())


def check_learnable(samples: MixedSamples) -> None:
    """UserError for a source of which no sample has anything to predict; looks no further than the first that has."""
    for i, source in samples.sized.items():
        if not any(_has_readable_label(source, position) for position in range(len(source))):
            raise UserError(
                f"nothing can be learned from {samples.names[i]}: no sample has a token to predict, because answers "
                f"are missing, have weight 0, or begin behind the first {source.seq_len} tokens; look at it with "
                "`lamella data show`, or raise seq_len"
            )


def _has_readable_label(source: Samples, position: int) -> bool:
    try:
        return has_label(source.sample(position))
    except BadData:
        return True  # the policy on bad data decides


def spread(samples: MixedSamples, count: int) -> dict[str, list[Sample]]:
    """Name of source -> its share of `count` samples (or of all, if there are fewer), at even distances; by policy,
    where one is damaged, another. A source without a share is left out."""
    shares = samples.interleaving.counts(min(count, len(samples)))
    parts = [(s, len(source), min(shares[s], len(source))) for s, source in samples.sized.items()]
    found: dict[str, list[Sample]] = {}
    for s, size, share in parts:
        if share:
            found.setdefault(samples.names[s], []).extend(samples.readable(s, i * size // share) for i in range(share))
    return found


def collate(samples: Sequence[Sample]) -> tuple[dict[str, Tensor], Tensor]:
    """Samples as one batch: ({"input" [B, L], "positions" [B, L]}, labels [B, L])."""
    ids_BL, labels_BL, positions_BL = (torch.stack(parts) for parts in zip(*samples, strict=True))
    return {"input": ids_BL, "positions": positions_BL}, labels_BL


def blank(sample: Sample) -> Sample:
    """The sample with nothing to predict: fills the share of a rank that has no other."""
    return sample._replace(labels_L=torch.full_like(sample.labels_L, IGNORE_INDEX))


def nothing(seq_len: int) -> Sample:
    """A sample of token 0 with nothing to predict: stands for one that cannot be read."""
    zeros_L = torch.zeros(seq_len, dtype=torch.int64)
    return Sample(zeros_L, torch.full_like(zeros_L, IGNORE_INDEX), torch.arange(seq_len))


class Given(NamedTuple):
    """A micro-batch of one rank, and where the run is behind it."""

    batch: tuple[dict[str, Tensor], Tensor]
    consumed: int
    places: list[StreamState]


class SampleLoader(BaseDataLoader):
    """Micro-batches of one data-parallel rank, made ahead by a thread while the model computes."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """The samples of the run."""

        samples: MixedSamples
        """Opened before the ranks meet."""
        samples_per_step: int = 1
        """Of all ranks; so many are made ahead."""
        end: int | None = None
        """The run takes so many samples."""

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, local_batch_size: int, **_: object):
        self.samples, self.end = config.samples, config.end
        self.dp_world_size, self.dp_rank, self.local_batch_size = dp_world_size, dp_rank, local_batch_size
        self.depth = max(1, config.samples_per_step // (dp_world_size * local_batch_size))
        self.consumed = 0
        """Samples given out so far, over all ranks."""
        self.prefetch: Prefetch[Given] | None = None
        ranks = _all_ranks() if self.samples.streams else Ranks()
        for stream in self.samples.streams.values():
            stream.ranks = ranks

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        self.prefetch = Prefetch(self._batches(self.consumed), self.depth)
        try:
            for given in self.prefetch:
                self.consumed = given.consumed
                self.samples.given_out(given.places)
                yield given.batch
        finally:
            self.close()

    def _batches(self, consumed: int) -> Iterator[Given]:
        """In the thread: the micro-batches behind so many samples of all ranks."""
        while self.end is None or consumed < self.end:
            first = consumed + self.dp_rank * self.local_batch_size
            indices = range(first, first + self.local_batch_size)
            consumed += self.dp_world_size * self.local_batch_size
            self.samples.read_ahead(consumed)
            inputs, labels_BL = collate([self.samples.sample(i) for i in indices])
            # which text each sample is of, for losses that depend on it
            inputs["source"] = torch.tensor([self.samples.locate(i)[0] for i in indices])
            yield Given((inputs, labels_BL), consumed, self.samples.advance(consumed))

    def close(self) -> None:
        """End the thread that makes micro-batches; on every rank after the same one."""
        if self.prefetch is not None:
            self.prefetch.close()
            self.prefetch = None

    def state_dict(self) -> Json:
        """The number of samples consumed over all ranks, and the places of streams."""
        if not self.samples.streams:
            return {"consumed_samples": self.consumed}
        places = self.samples.places or self.samples.advance(self.consumed)
        return {"consumed_samples": self.consumed, "streams": self.samples.stream_states(places)}

    def load_state_dict(self, state_dict: Json) -> None:
        """Go on behind a state."""
        self.close()
        self.consumed = state_dict["consumed_samples"]
        if self.samples.streams:
            self.samples.load_stream_states(state_dict["streams"])


def _all_ranks() -> Ranks:
    """The ranks of the run, in a group of their own: a thread uses it beside the training."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Ranks()
    group, size = dist.new_group(backend="gloo"), dist.get_world_size()
    assert isinstance(group, dist.ProcessGroup), "all ranks are in it"

    def gather(mine: object) -> list[object]:
        everyones: list[object] = [None] * size
        dist.all_gather_object(everyones, mine, group=group)
        return everyones

    return Ranks(dist.get_rank(), size, gather)
