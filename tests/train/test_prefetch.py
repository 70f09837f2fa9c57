"""A thread makes items ahead: in order, a known number of them, and what goes wrong is told where it is due."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from lamella.data.packing import Sample
from lamella.train.data import MixedSamples, SampleLoader
from lamella.train.prefetch import Prefetch


class Numbers:
    """Samples of one token."""

    seq_len, hash = 1, "numbers"

    def __len__(self) -> int:
        return 12

    def sample(self, index: int) -> Sample:
        return Sample(*(torch.tensor([x]) for x in (index, index + 1, 0)))


def wait_for(condition) -> None:
    until = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_items_come_in_order_and_errors_behind_those_made_before():
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("the sixth")

    prefetch = Prefetch(items(), 2)
    assert [next(prefetch) for _ in range(5)] == list(range(5))
    with pytest.raises(ValueError, match="the sixth"):
        next(prefetch)
    assert list(Prefetch(iter("abc"), 1)) == ["a", "b", "c"]


@pytest.mark.parametrize("taken", [0, 3])
def test_as_many_are_made_ahead_on_every_rank_however_soon_it_closes(taken):
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            time.sleep(0.005)
            made.append(i)
            yield i

    prefetch = Prefetch(items(), 4)
    for _ in range(taken):
        next(prefetch)
    prefetch.close()
    assert len(made) == taken + 4 + 1
    assert not prefetch.thread.is_alive()


def test_the_cursor_counts_what_was_given_out_and_not_what_was_made():
    config = SampleLoader.Config(samples=MixedSamples([Numbers()]), samples_per_step=6, end=24)
    loader = config.build(dp_world_size=1, dp_rank=0, local_batch_size=2)
    batches = iter(loader)
    next(batches)
    assert loader.prefetch is not None
    wait_for(lambda: loader.prefetch.queue.full())
    assert loader.state_dict() == {"consumed_samples": 2}
    assert len(list(batches)) == 11  # the run ends there
    assert loader.state_dict() == {"consumed_samples": 24}


def test_samples_are_made_by_another_thread():
    class Watched(MixedSamples):
        def sample(self, index):
            threads.add(threading.current_thread().name)
            return super().sample(index)

    threads: set[str] = set()
    samples = Watched([Numbers()])
    loader = SampleLoader.Config(samples=samples).build(dp_world_size=1, dp_rank=0, local_batch_size=2)
    batches = iter(loader)
    next(batches)
    loader.close()
    assert threads == {"prefetch"}
