"""Orders and mixtures as arithmetic on the index: bijections, exact shares, no memory of what came before."""

import random

import numpy as np
import pytest

from lamella.data.order import Interleaving, Permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097])
def test_a_permutation_gives_every_index_once(size):
    assert sorted(Permutation(size, 0, 1)[i] for i in range(size)) == list(range(size))


def test_a_permutation_depends_on_its_whole_key():
    orders = [[p[i] for i in range(100)] for p in (Permutation(100, *k) for k in [(0, 0), (0, 1), (1, 0), (0, 0)])]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_permutation_mixes():
    """Neighbours land anywhere: the mean distance of two random places is a third of the size."""
    order = np.array([Permutation(50_000, 5, 0)[i] for i in range(50_000)])
    assert np.abs(np.diff(order)).mean() == pytest.approx(50_000 / 3, rel=0.02)  # standard error 0.3%
    assert abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02  # 4 standard errors of 1/sqrt(n)


def test_a_permutation_of_a_large_set_stores_nothing():
    order = Permutation(10**15, 1)
    seen = {order[i] for i in range(10**15 - 1000, 10**15)}
    assert len(seen) == 1000
    assert all(0 <= i < 10**15 for i in seen)


@pytest.mark.parametrize("seed", [None, 0, 3])
@pytest.mark.parametrize(
    "weights", [[1], [3, 1], [0.75, 0.25], [5, 0, 2], [0, 0, 1], [0.2, 0.3, 0.1, 0.4], [7, 11, 13]]
)
def test_every_window_has_exact_shares(weights, seed):
    dealt = Interleaving(weights, seed)
    total = sum(dealt.weights)
    assert np.allclose(np.array(dealt.weights) / total, np.array(weights) / sum(weights))
    places = [dealt.place(i) for i in range(4 * total)]
    for first in range(3 * total):
        sources = [s for s, _ in places[first : first + total]]
        assert [sources.count(s) for s in range(len(weights))] == dealt.weights
    taken = [0] * len(weights)
    for i, (source, count) in enumerate(places):
        assert dealt.counts(i) == taken
        assert count == taken[source]
        taken[source] += 1


def test_awkward_weights_stay_near_their_share_at_any_length():
    rng = random.Random(0)
    for num_sources in (2, 3, 5, 8):
        weights = [rng.random() for _ in range(num_sources)]
        dealt = Interleaving(weights, 1)
        for count in [rng.randrange(10**12) for _ in range(200)]:
            counts = dealt.counts(count)
            assert sum(counts) == count
            off = [abs(c - count * w / sum(weights)) for c, w in zip(counts, weights, strict=True)]
            assert max(off) < np.ceil(np.log2(num_sources)) + 1e-3  # floats of 1e12
            source, before = dealt.place(count)
            assert before == counts[source]
