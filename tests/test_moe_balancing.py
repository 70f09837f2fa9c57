"""Balancing: shares that are met, signs that settle, and measures with known values."""

import pytest
import torch

from lamella.config import MoEConfig
from lamella.moe.balancing import expert_counts, max_violation, routing_entropy, share_bias, sign_update
from lamella.moe.routing import choose_pairs, choose_top_k, expert_scores, pair_margins

S, T = 8, 4096
CONFIG = MoEConfig(S, S, 32, S, (0,))


def margins_and_scores(seed: int = 0, std: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    logits_TS = std * torch.randn(T, S, generator=generator) + torch.randn(S, generator=generator)
    scores_TE = expert_scores(logits_TS, CONFIG)
    return pair_margins(scores_TE), scores_TE


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.8, 1.0])
def test_share_bias_gives_the_share_on_its_tokens(share):
    margins_TS, scores_TE = margins_and_scores()
    copies_TS = choose_pairs(scores_TE, share_bias(margins_TS, share)) >= S
    # the token at the quantile itself goes to the slice: one of 4,096 tokens off at most, two for rounding
    assert (copies_TS.float().mean(0) - share).abs().max() <= 2 / T


@pytest.mark.parametrize(("share", "first_copy"), [(0.0, False), (-1.0, False), (1.0, True), (2.0, True)])
def test_shares_zero_and_one_hold_on_any_text(share, first_copy):
    margins_TS, _ = margins_and_scores()
    _, other_scores_TE = margins_and_scores(seed=1, std=5.0)
    copies_TS = choose_pairs(other_scores_TE, share_bias(margins_TS, share)) >= S
    assert (copies_TS == first_copy).all()


def test_counts():
    counts = expert_counts(torch.tensor([[0, 2], [0, 3], [0, 2]]), 5)
    assert counts.tolist() == [3, 0, 2, 1, 0]
    assert counts.dtype == torch.float32


@pytest.mark.parametrize(
    ("counts", "violation", "entropy"),
    [
        ([5, 5, 5, 5], 0.0, 1.0),
        ([20, 0, 0, 0], 3.0, 0.0),
        ([10, 10, 0, 0], 1.0, 0.5),  # log 2 / log 4
        ([6, 5, 5, 4], 0.2, 0.992736),  # -sum p log p / log 4, by hand
    ],
)
def test_measures_of_balance(counts, violation, entropy):
    counts_E = torch.tensor(counts, dtype=torch.float32)
    assert max_violation(counts_E).item() == pytest.approx(violation, abs=1e-6)
    assert routing_entropy(counts_E).item() == pytest.approx(entropy, abs=1e-5)


def test_the_sign_update_moves_by_its_rate_and_keeps_the_mean():
    bias = sign_update(torch.zeros(4), torch.tensor([9.0, 1.0, 5.0, 5.0]), 0.25)
    assert bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    bias = sign_update(torch.zeros(4), torch.tensor([9.0, 1.0, 1.0, 1.0]), 0.1)
    assert bias.mean().item() == pytest.approx(0, abs=1e-8)
    assert (bias[1] - bias[0]).item() == pytest.approx(0.2)


def test_the_sign_update_balances_a_skewed_router_and_settles():
    """Fresh tokens at every step from a router that prefers some experts."""
    E, K, rate = 16, 8, 0.003
    generator = torch.Generator().manual_seed(0)
    skew_E = torch.randn(E, generator=generator)
    bias_E, violations = torch.zeros(E), []
    for _ in range(400):
        scores_TE = (skew_E + torch.randn(T, E, generator=generator)).sigmoid()
        counts_E = expert_counts(choose_top_k(scores_TE, bias_E, K), E)
        violations.append(max_violation(counts_E).item())
        bias_E = sign_update(bias_E, counts_E, rate)
    assert violations[0] > 0.5
    assert max(violations[-100:]) < 0.15  # all of the last hundred steps, so it does not swing either
