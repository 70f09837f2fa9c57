"""Balancing: shares that are met, signs that settle, and measures with known values."""

import pytest
import torch

from lamella.architecture.moe import MoEConfig
from lamella.moe import balancing
from lamella.moe.balancing import (
    add_gradient_of,
    auxiliary_loss,
    balanced_bias,
    expert_counts,
    max_violation,
    routing_entropy,
    share_bias,
    sign_update,
)
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


def test_auxiliary_loss_tells_collapse_from_balance():
    """1 when even, E/K when K experts have everything, and its gradient lowers the scores of the overloaded."""
    T, E, K = 64, 8, 2
    even = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], dim=1)
    flat = torch.full((T, E), 0.5)
    torch.testing.assert_close(auxiliary_loss(flat, even), torch.tensor(1.0))
    peaked = torch.full((T, E), 1e-4)
    peaked[:, :K] = 1.0
    collapsed = torch.arange(K).expand(T, K)
    assert auxiliary_loss(peaked, collapsed) == pytest.approx(E / K, rel=1e-2)
    scores = flat.clone().requires_grad_()
    auxiliary_loss(scores, collapsed).backward()
    assert (scores.grad[:, :K] > 0).all()
    assert (scores.grad[:, K:] < 0).all()


def test_descending_the_auxiliary_loss_balances_a_collapsed_router():
    torch.manual_seed(0)
    T, D, E, K = 512, 16, 8, 2
    x_TD, weight_ED = torch.randn(T, D), torch.randn(E, D) * 0.1
    x_TD[:, 0] += 3.0
    weight_ED[:2, 0] += 2.0  # two experts that everyone likes
    weight_ED.requires_grad_()
    optimizer = torch.optim.Adam([weight_ED], lr=0.02)

    def step() -> float:
        scores = (x_TD @ weight_ED.T).sigmoid()
        ids = scores.topk(K, dim=-1).indices
        optimizer.zero_grad()
        auxiliary_loss(scores, ids).backward()
        optimizer.step()
        return max_violation(expert_counts(ids, E)).item()

    first = step()
    last = [step() for _ in range(200)][-1]
    assert first > 2
    assert last < 0.5 * first


def test_a_gradient_is_added_without_a_change_of_the_value():
    x = torch.randn(4, requires_grad=True)
    y = add_gradient_of(2 * x, 3 * x.sum())
    torch.testing.assert_close(y, 2 * x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((4,), 5.0))


@pytest.mark.parametrize("first_balanced", [balancing.FIRST_BALANCED, 256])
def test_balanced_bias_reaches_its_target(monkeypatch, first_balanced):
    """On all tokens, also where a part of them is balanced first."""
    monkeypatch.setattr(balancing, "FIRST_BALANCED", first_balanced)
    torch.manual_seed(0)
    scores = torch.randn(2048, 8) + torch.arange(8) * 0.3
    before = max_violation(expert_counts(scores.topk(2).indices, 8))
    bias = balanced_bias(scores, torch.zeros(8), 2, 0.05)
    assert before > 1
    assert max_violation(expert_counts((scores + bias).topk(2).indices, 8)) <= 0.05
