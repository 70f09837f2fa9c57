"""Routing: twin is a plain top-k over mirrored logits, weights know no bias, zero rows weigh 1."""

import pytest
import torch

from lamella.architecture.moe import DENSE_BIAS, MoEConfig
from lamella.errors import UserError
from lamella.moe.routing import (
    choice_margins,
    choose_top_k,
    expert_scores,
    fixed_routing,
    gate_weights,
    pair_margins,
    route,
    router_logits,
)

S, T, D = 8, 500, 16


def make_config(routing="twin", gate="sigmoid", top_k=S, **changes) -> MoEConfig:
    options = {"norm_topk_prob": True, "route_scale": float(top_k)} | changes
    return MoEConfig(S, S, 32, top_k, (0,), routing, gate, **options)


def random(*shape, seed=0, std=1.0):
    return std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("logit_std", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("bias_std", [0.0, 0.2, 1.0])
def test_twin_routing_is_a_plain_top_k_of_an_antisymmetric_gate(logit_std, bias_std):
    logits_TS, bias_S = random(T, S, std=logit_std), random(S, seed=1, std=bias_std)
    plain_scores_TE = torch.cat([-logits_TS, logits_TS], -1).sigmoid()
    plain = choose_top_k(plain_scores_TE, torch.cat([-bias_S, bias_S]), S)
    config = make_config()
    twin = route(expert_scores(logits_TS, config), bias_S, config)
    assert torch.equal(twin.expert_ids_TK.sort().values, plain.sort().values)
    assert torch.equal(twin.expert_ids_TK % S, torch.arange(S).expand(T, S))  # column i: slice i or its copy
    weights = plain_scores_TE.gather(-1, twin.expert_ids_TK)
    torch.testing.assert_close(twin.weights_TK, S * weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_a_slice_that_stands_in_for_its_twin_has_the_twins_weight(gate):
    """However few twins are allowed, the pairs weigh what they do without a limit."""
    config, bias_S = make_config(gate=gate), random(S, seed=1, std=0.1)
    scores_TE = expert_scores(random(T, S, std=3.0), config)
    free = route(scores_TE, bias_S, config)
    for share in (0.0, 0.25, 1.0):
        held = route(scores_TE, bias_S, config, twin_share=share)
        assert torch.equal(held.weights_TK, free.weights_TK)
        assert (
            (held.expert_ids_TK >= S).sum(-1) == (free.expert_ids_TK >= S).sum(-1).clamp(max=round(share * S))
        ).all()
        assert (held.expert_ids_TK <= free.expert_ids_TK).all()


@pytest.mark.parametrize("routing", ["twin", "flat"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_zero_rows_weigh_every_choice_exactly_one(routing, gate):
    config = make_config(routing, gate)
    R = config.num_router_rows
    scores_TE = expert_scores(router_logits(random(T, D), torch.zeros(R, D)), config)
    routing_ = route(scores_TE, random(R, seed=2), config)
    assert torch.equal(routing_.weights_TK, torch.ones(T, S))


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("logit_std", [0.0, 1.0, 20.0])
def test_the_bias_at_conversion_sends_all_to_the_slices(gate, logit_std):
    twin, flat = make_config("twin", gate), make_config("flat", gate)
    ids = route(expert_scores(random(T, S, std=logit_std), twin), torch.full((S,), DENSE_BIAS), twin).expert_ids_TK
    assert torch.equal(ids, torch.arange(S).expand(T, S))
    bias_E = torch.cat([torch.zeros(S), torch.full((S,), DENSE_BIAS)])
    # Scores lie in [0, 1], so a bias of -1 puts every copy at or below every slice.
    scores_TE = expert_scores(random(T, 2 * S, std=min(logit_std, 5)), flat)
    assert (route(scores_TE, bias_E, flat).expert_ids_TK < S).all()


@pytest.mark.parametrize("routing", ["twin", "flat"])
@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
def test_the_bias_selects_but_never_weighs(routing, gate):
    config = make_config(routing, gate, top_k=S)
    logits = random(T, config.num_router_rows).requires_grad_()
    bias = random(config.num_router_rows, seed=1, std=0.3).requires_grad_()
    scores = expert_scores(logits, config)
    biased = route(scores, bias, config)
    assert not torch.equal(biased.expert_ids_TK, route(scores, 0 * bias, config).expert_ids_TK)
    torch.testing.assert_close(biased.weights_TK, gate_weights(scores, biased.expert_ids_TK, config), rtol=0, atol=0)
    biased.weights_TK.square().sum().backward()
    assert bias.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("routing", ["twin", "flat"])
def test_weights_are_normalised_and_scaled_as_the_config_says(routing):
    config = make_config(routing)
    scores = expert_scores(random(T, config.num_router_rows), config)
    ids = route(scores, torch.zeros(config.num_router_rows), config).expert_ids_TK
    # fp32: a sum of 8 terms near 1
    torch.testing.assert_close(gate_weights(scores, ids, config).sum(-1), torch.full((T,), 8.0), rtol=0, atol=5e-6)
    plain = gate_weights(scores, ids, make_config(routing, norm_topk_prob=False, route_scale=2.5))
    assert torch.equal(plain, 2.5 * scores.gather(-1, ids))


def test_softmax_scores_add_up_to_one_and_flat_takes_the_largest():
    config = make_config("flat", "softmax", top_k=3)
    scores = expert_scores(random(T, 2 * S), config)
    torch.testing.assert_close(scores.sum(-1), torch.ones(T))
    ids = route(scores, torch.zeros(2 * S), config).expert_ids_TK
    assert ids.shape == (T, 3)
    chosen = torch.zeros(T, 2 * S, dtype=torch.bool).scatter(1, ids, True)
    assert (scores.masked_fill(~chosen, 2).min(-1).values >= scores.masked_fill(chosen, -1).max(-1).values).all()


def test_margins_of_sigmoid_pairs():
    logits_TS = random(T, S)
    # 2 sigmoid(l) - 1 = tanh(l / 2)
    torch.testing.assert_close(pair_margins(expert_scores(logits_TS, make_config())), (logits_TS / 2).tanh())


def test_logits_are_float32_whatever_comes_in():
    x, w = random(T, D).bfloat16(), random(S, D, seed=1).bfloat16()
    expected = x.float() @ w.float().T
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, w)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # fp32, 16 terms in another order


@pytest.mark.parametrize("routing", ["twin", "flat"])
def test_fixed_routing(routing):
    config = make_config(routing)
    dense, learned, chance = (
        fixed_routing(T, mode, config, torch.device("cpu")) for mode in ("dense", "learned", "random")
    )
    assert torch.equal(dense.expert_ids_TK, torch.arange(S).expand(T, S))
    assert torch.equal(learned.expert_ids_TK, torch.arange(S, 2 * S).expand(T, S))
    assert all((r.weights_TK == 1).all() for r in (dense, learned, chance))
    ids = chance.expert_ids_TK
    assert all(len(set(row)) == S for row in ids.tolist())  # no expert twice
    assert abs((ids >= S).float().mean() - 0.5) < 4 * 0.5 / (T * S) ** 0.5  # fair: 4 standard deviations
    pairs_covered = torch.tensor([len(set(row)) for row in (ids % S).tolist()])
    assert (pairs_covered == S).all() if routing == "twin" else (pairs_covered < S).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routng": "twin"}, "unknown key 'routng' in the moe config .did you mean 'routing'"),
        ({"routing": "twins"}, "routing is 'twins'; it must be one of twin, flat .did you mean 'twin'"),
        ({"gate": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"num_experts_per_tok": 17, "routing": "flat"}, "top-k 17 is larger than the 16 experts"),
        ({"num_experts_per_tok": 4}, "top-k must be 8, not 4; use routing 'flat'"),
        ({"num_trainable_experts": 4}, "8 frozen and 4 trainable experts; use routing 'flat'"),
        ({"num_frozen_experts": 0}, "0 frozen and 8 trainable experts; use routing 'flat'"),
        ({"num_frozen_experts": -1}, "num_frozen_experts is -1; it must be at least 0"),
        ({"gate": "unit"}, "does not weigh the experts of a pair"),
        ({"per_layer": {0: {"top_k": 2}}}, "per_layer of layer 0: unknown key 'top_k'"),
        ({"per_layer": {0: {"num_experts_per_tok": 2}}}, "top-k must be 8, not 2"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        MoEConfig.from_dict(make_config().to_dict() | changes)


def test_the_config_survives_json():
    config = make_config("flat", top_k=5)
    assert MoEConfig.from_dict(config.to_dict()) == config
    assert (config.num_experts, config.num_router_rows, make_config().num_router_rows) == (16, 16, 8)
    with pytest.raises(UserError, match="lacks num_frozen_experts"):
        MoEConfig.from_dict({"routing": "twin"})


@pytest.mark.parametrize(("routing", "top_k"), [("twin", S), ("flat", 4), ("flat", 15)])
def test_a_token_keeps_its_experts_up_to_its_margin(routing, top_k):
    """A change of all biases by less than half the margin changes no choice; in twin routing, that is the smallest."""
    config = make_config(routing, top_k=top_k)
    R = S if routing == "twin" else 2 * S
    scores_TE, bias_R = expert_scores(random(T, R), config), random(R, seed=1, std=0.1)
    margin_T = choice_margins(scores_TE, bias_R, config)

    def chosen(t, shift_R):
        return sorted(route(scores_TE[t : t + 1], bias_R + shift_R, config).expert_ids_TK[0].tolist())

    signs_R = random(R, seed=2).sign()
    assert all(chosen(t, 0.49 * margin_T[t] * signs_R) == chosen(t, 0) for t in range(100))
    both = [chosen(t, 0.51 * margin_T[t] * signs_R * side) != chosen(t, 0) for t in range(100) for side in (1, -1)]
    assert any(both)


def test_without_another_choice_the_margin_is_infinite():
    config = make_config("flat", top_k=2 * S)
    assert choice_margins(torch.zeros(3, 2 * S), torch.zeros(2 * S), config).isinf().all()
