"""Schedules, parameter groups, balancing by quantiles and the routing loss, without a process group."""

from __future__ import annotations

import math

import pytest
import torch

from lamella.architecture.moe import MoEConfig
from lamella.errors import UserError
from lamella.moe.balancing import expert_counts, max_violation, pair_choice_loss, quantile_bias
from lamella.moe.routing import choose_top_k, expert_scores, gate_weights, route, with_top_k
from lamella.recipe.sections import TopKSchedule, TwinShare
from lamella.recipe.training import Recipe, make_recipe
from lamella.titan.parallelise import is_trained
from lamella.train.assemble import model_config
from lamella.train.balance import Balance, choice_targets
from lamella.train.fit_router import Margins, Moments, ridge_row
from lamella.train.optimizer import Schedules, group_name, optimizer_config
from support.models import PARTITIONED, tiny_moe, trainable_moe
from support.titan import load_titan

FLAT = MoEConfig(4, 4, 32, 2, (0,), routing="flat", route_scale=4.0)


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [
        (TwinShare(target=0.6, ramp_steps=3), (1, 2, 3, 4, 9), [0, 0.2, 0.4, 0.6, 0.6]),
        (TwinShare(), (1, 2), [0.5, 0.5]),
        (TwinShare(start=0.2, hold_steps=2, ramp_steps=2, target=0.8), range(2, 7), [0.2, 0.2, 0.5, 0.8, 0.8]),
        (TwinShare(start=1.0, hold_steps=1, target=0.0), (1, 2), [1.0, 0.0]),
    ],
)  # fmt: skip
def test_share_schedules(share, steps, expected):
    assert [share.at(step) for step in steps] == pytest.approx(expected)


def test_top_k_goes_from_its_start_to_the_models_own():
    schedule = TopKSchedule(start=8, hold_steps=1, ramp_steps=6)
    assert [schedule.at(step, 2) for step in range(1, 10)] == [8, 8, 7, 6, 5, 4, 3, 2, 2]
    assert TopKSchedule(start=1, ramp_steps=2).at(2, 3) == 2


@pytest.mark.parametrize("changes", [{}, {"norm_topk_prob": False}, {"gate": "softmax", "norm_topk_prob": False}])
def test_another_top_k_keeps_the_scale_of_equal_scores(changes):
    config = MoEConfig(4, 4, 32, 2, (0,), routing="flat", route_scale=4.0, **changes)
    scores_TE = expert_scores(torch.zeros(3, 8), config)

    def total(config):
        return route(scores_TE, torch.zeros(8), config).weights_TK.sum(-1)

    for top_k in (1, 5, 8):
        assert torch.allclose(total(with_top_k(config, top_k)), total(config))


def test_all_parts_of_a_partition_are_the_dense_ffn():
    config = with_top_k(MoEConfig(0, 6, 16, 2, (0,), routing="flat", gate="unit"), 6)
    scores_TE = torch.randn(3, 6)
    ids_TK = choose_top_k(scores_TE, torch.zeros(6), 6)
    assert gate_weights(scores_TE, ids_TK, config, torch.zeros(6)).eq(1).all()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_quantile_bias_balances_at_once(top_k):
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(4096, 8, generator=generator) + torch.randn(8, generator=generator)
    scores_TE = logits_TE.sigmoid()

    def violation(bias_E):
        return float(max_violation(expert_counts(choose_top_k(scores_TE, bias_E, top_k), 8)))

    # each expert's quantile alone leaves what depends on which experts are high together
    assert violation(quantile_bias(scores_TE, top_k / 8)) < 0.35 * violation(torch.zeros(8))


def test_choice_loss_is_a_cross_entropy_on_each_pairs_logit():
    logits_TS = torch.randn(5, 4, requires_grad=True)
    config = MoEConfig(4, 4, 32, 4, (0,))
    targets_T = torch.tensor([0.0, 1.0, math.nan, 0.0, 1.0])
    loss = pair_choice_loss(expert_scores(logits_TS, config), targets_T)
    chosen = torch.tensor([0, 1, 3, 4])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_TS[chosen], targets_T[chosen, None].expand(4, 4), reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item() / 4, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, logits_TS)
    assert torch.allclose(gradient[chosen], (logits_TS.sigmoid()[chosen] - targets_T[chosen, None]) / 4, atol=1e-6)
    assert gradient[2].eq(0).all()

    sure = torch.full((1, 4), 40.0, requires_grad=True)  # and wrong
    (gradient,) = torch.autograd.grad(pair_choice_loss(expert_scores(sure, config), torch.zeros(1)), sure)
    assert torch.allclose(gradient, torch.full((1, 4), 1 / 4))


@pytest.mark.slow
def test_routing_loss_moves_the_router_towards_what_the_source_is_for(tmp_path):
    tiny_moe("llama", tmp_path)
    model = load_titan(tmp_path).train()
    routing_loss = {"coefficient": 2.0, "to_slices": ["a"], "to_twins": ["c"]}
    recipe = make_recipe({"data": ["a", "b", "c"], "routing_loss": routing_loss, "samples_per_step": 3, "seq_len": 16})
    assert [str(t) for t in choice_targets(recipe)] == ["0.0", "nan", "1.0"]
    unused = [{"source": name, "weight": weight} for name, weight in (("a", 1), ("b", 0), ("c", 1))]
    assert str(choice_targets(recipe.model_copy(update={"data": make_recipe({"data": unused}).data}))[2]) == "1.0"
    balance = Balance(model, recipe, None)
    tokens = torch.randint(128, (3, 16), generator=torch.Generator().manual_seed(0))
    router = model.moe_layers[1].router.weight

    def gradient(source_B):
        targets_B = balance.choice_targets(torch.tensor(source_B))
        model.zero_grad()
        (model(tokens, choice_targets_B=targets_B) * 0).sum().backward()
        return router.grad.clone()

    assert gradient([1, 1, 1]).eq(0).all()
    to_slices, to_twins = gradient([0, 0, 0]), gradient([2, 2, 2])
    # d(-log p): sigmoid(l) x towards the slices, (sigmoid(l) - 1) x towards the twins
    with torch.no_grad():
        seen = {}
        hook = model.moe_layers[1].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
        model(tokens)
        hook.remove()
        x_TD = seen["x"].flatten(0, 1)
        probability_TS = (x_TD @ router.T).sigmoid()
    scale = 2.0 / (3 * 16) / probability_TS.shape[1]
    assert torch.allclose(to_slices, scale * probability_TS.T @ x_TD, atol=1e-5)  # fp32 sums of 48 terms
    assert torch.allclose(to_twins, scale * (probability_TS - 1).T @ x_TD, atol=1e-5)
    mixed = sum(gradient(source) for source in ([0, 1, 1], [1, 0, 1], [1, 1, 0]))
    assert torch.allclose(mixed, to_slices, atol=1e-5)
    routers = {layer.router.weight for layer in model.moe_layers}
    assert all(p in routers or p.grad is None or p.grad.eq(0).all() for p in model.parameters())


def test_the_fitted_row_is_the_ridge_regression_onto_the_sides():
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(n, 6, generator=generator) + mean for n, mean in ((40, 0.5), (100, -0.2))]
    moments = [Moments(6), Moments(6)]
    for side, found in zip(sides, moments, strict=True):
        found.add(side[:30])
        found.add(side[30:])
    row_D = ridge_row(*moments, ridge=0.01).double().requires_grad_()
    new, old = (side.double() for side in sides)
    scale = sum((side**2).mean() for side in (new, old))
    loss = ((new @ row_D - 1) ** 2).mean() + ((old @ row_D + 1) ** 2).mean() + 0.01 * scale * row_D.square().sum()
    (gradient,) = torch.autograd.grad(loss, row_D)
    assert gradient.abs().max() < 1e-6  # moments and row are float32


@pytest.mark.parametrize("gate", ["sigmoid", "softmax"])
@pytest.mark.parametrize("recall", [0.5, 0.9])
def test_this_share_of_new_tokens_goes_to_the_copies(gate, recall):
    generator = torch.Generator().manual_seed(0)
    x_TD, row_D = torch.randn(5000, 16, generator=generator), torch.randn(16, generator=generator) / 8
    config = MoEConfig(4, 4, 32, 4, (0,), gate=gate, route_scale=4.0)
    margins = Margins(row_D, config)
    for part in x_TD.split(1700):
        margins.add(part)
    bias_S = margins.bias(recall, ()).expand(4)
    scores_TE = expert_scores((x_TD @ row_D)[:, None].expand(-1, 4), config)
    copies_TK = route(scores_TE, bias_S, config).expert_ids_TK >= 4
    assert copies_TK.all(1).eq(copies_TK.any(1)).all()  # all pairs alike
    # the token at the quantile itself goes to the slices: one off, and some for rounding
    assert abs(copies_TK[:, 0].float().mean().item() - recall) <= 3 / 5000


def test_quantile_and_top_k_reach_the_layers(tmp_path):
    tiny_moe("llama", tmp_path, routing="flat")
    model = load_titan(tmp_path).train()
    recipe = make_recipe(
        {"balancing": "quantile", "top_k_schedule": {"start": 8, "ramp_steps": 4}, "samples_per_step": 4}
    )
    balance = Balance(model, recipe, None)
    tokens = torch.randint(128, (4, 64), generator=torch.Generator().manual_seed(0))
    violations, chosen = [], []
    for step in (1, 5, 6, 7):
        balance.aim(step)
        for micro_batch in tokens.chunk(2):
            model(micro_batch)
        balance.update()
        violations.append(balance.report().max_vio[0])
        chosen.append(model.moe_layers[0].last_routing.expert_ids_TK.shape[1])
    assert chosen == [8, 4, 4, 4]
    assert violations[0] == 0  # every expert has every token
    assert violations[-1] < 0.4  # the mean of two halves' quantiles is not quite the whole's
    balance.aim(1)
    assert model.moe_layers[0].aim.next_share == pytest.approx(7 / 8)


def test_no_balancing_moves_no_bias(tmp_path):
    tiny_moe("llama", tmp_path, routing="flat")
    model = load_titan(tmp_path).train()
    balance = Balance(model, Recipe(balancing="none"), None)
    before = model.moe_layers[0].router.selection_bias.clone()
    balance.aim(1)
    model(torch.randint(128, (2, 16)))
    balance.update()
    assert torch.equal(before, model.moe_layers[0].router.selection_bias)


@pytest.mark.parametrize(
    ("routing", "settings", "message"),
    [
        ("flat", {"routing_loss": {"to_slices": ["python-docs"]}}, "routing_loss is for twin routing"),
        ("twin", {"top_k_schedule": {"start": 4, "ramp_steps": 4}}, "top_k_schedule is for flat routing"),
        ("flat", {"top_k_schedule": {"start": 9, "ramp_steps": 4}}, "has 8 experts; lower it"),
    ],
)
def test_settings_of_another_routing_are_refused(routing, settings, message, tmp_path):
    tiny_moe("llama", tmp_path, routing=routing)
    with pytest.raises(UserError, match=message):
        model_config(make_recipe({"model": str(tmp_path), "seq_len": 16} | settings))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"routing_loss": {}}, "names no source"),
        ({"routing_loss": {"to_slices": ["python-doc"]}}, r"data does not \(did you mean 'python-docs'"),
        (
            {"routing_loss": {"to_slices": ["a"], "to_twins": ["a"]}, "data": ["a"]},
            "cannot be for both slices and twins",
        ),
        ({"routing_loss": {"to_slices": ["python-docs"]}, "trains": "experts"}, "trains the router"),
        ({"router_fit": {"to_slices": ["python-docs"]}}, "needs sources on both sides"),
        ({"router_fit": {"to_slices": ["python-doc"], "to_twins": ["stdlib-code"]}}, "router_fit names 'python-doc'"),
        ({"routing_loss": {"coef": 3}}, "unknown key 'routing_loss.coef'"),
        ({"router_warmup_steps": 3, "trains": "experts"}, "needs trains"),
        ({"router_warmup_steps": 9, "steps": 9}, "must be below steps"),
        ({"top_k_schedule": {"start": 0, "ramp_steps": 1}}, "top_k_schedule.start"),
    ],
)
def test_impossible_schedules_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        make_recipe(values)


def optimizers(folder, **settings):
    """The recipe's optimizer and schedules over the model in `folder`, and its parameters' names."""
    recipe = make_recipe({"model": str(folder), "steps": 10, "lr": 1.0, "seq_len": 16} | settings)
    model = load_titan(folder)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, recipe.trains))
    config = optimizer_config(recipe)
    config.implementation = "for-loop"
    container = config.build(model_parts=[model])
    schedule = Schedules.Config(
        warmup_steps=recipe.warmup_steps, router_warmup_steps=recipe.router_warmup_steps, decay_ratio=0.0
    )
    return container.optimizers[0], schedule.build(optimizers=container, training_steps=recipe.steps)


def test_each_group_has_its_rate_and_decay(tmp_path):
    trainable_moe(tmp_path, moe_changes=PARTITIONED)
    settings = {"router_lr_scale": 3.0, "rest_lr_scale": 0.5, "weight_decay": 0.2, "router_weight_decay": 0.1}
    optimizer, _ = optimizers(tmp_path, trains="all", rest_weight_decay=0.3, **settings)
    found = {
        name: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for name in group["param_names"]
    }
    layer = "layers.0."
    assert found[f"{layer}moe.router.weight"] == found[f"{layer}moe.router.up_weight"] == (3.0, 0.1)
    assert found[f"{layer}moe.experts.trainable_down_proj"] == found[f"{layer}moe.shared.down_proj"] == (1.0, 0.2)
    assert found[f"{layer}moe.output_bias"] == (1.0, 0.0)
    assert found[f"{layer}attention_norm.weight"] == found[f"{layer}attention.wo.bias"] == (0.5, 0.0)
    assert found[f"{layer}attention.wo.weight"] == found["layers.1.feed_forward.w1.weight"] == (0.5, 0.3)


def test_the_router_warms_up_alone_and_the_others_after_it(tmp_path):
    trainable_moe(tmp_path)
    optimizer, schedule = optimizers(tmp_path, warmup_steps=2, router_warmup_steps=3, router_lr_scale=2.0)
    rates = {"router": [], "experts": []}
    for _ in range(7):
        for group, reported in zip(optimizer.param_groups, schedule.get_metrics().values(), strict=True):
            rates[group_name(group["param_names"])].append(group["lr"])
            assert group["lr"] == reported
        optimizer.step()
        schedule.step()
    assert rates == {"router": [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], "experts": [0, 0, 0, 0.5, 1.0, 1.0, 1.0]}
    state = schedule.state_dict()
    _, again = optimizers(tmp_path, warmup_steps=2, router_warmup_steps=3, router_lr_scale=2.0)
    again.load_state_dict(state)
    assert list(again.get_metrics().values()) == list(schedule.get_metrics().values())
