"""Every expert path against the loop: outputs and all gradients, whatever the load."""

import pytest
import torch
from transformers.activations import ACT2FN

from lamella.architecture.moe import MoEConfig
from lamella.errors import UserError
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.experts import PATHS, MoEWeights, Resident, SharedExpert, apply_experts, gated_ffn, moe_ffn
from lamella.moe.packed import Experts
from lamella.moe.paths import fused, row_ops
from lamella.moe.routing import Routing, expert_scores, fixed_routing, route
from support.experts import LOADS, TOLERANCE, D, S, T, assert_close, f, make_experts, make_ids, random, run
from support.slicing import slice_ffn

# Triton's interpreter runs `fused` in interpreted_kernels.py; test_quack.py computes the products of `quack` elsewhere
RUNNABLE = [path for path in PATHS if path not in ("fused", "quack")]
FAST = [path for path in RUNNABLE if path != "loop"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("path", FAST)
def test_paths_agree_with_the_loop(path, load, dtype):
    expected, actual = run("loop", load, dtype), run(path, load, dtype)
    assert_close(actual, expected, dtype)
    # An expert without tokens has the gradient zero, in every path.
    for name in ("gate_up", "down"):
        empty = [e for e in range(S) if not (make_ids(load) == S + e).any()]
        assert all((actual[name][e] == 0).all() for e in empty)


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "silu"])
def test_other_activations_agree_with_the_loop(path, activation):
    expected, actual = run("loop", "twin", torch.float32, activation), run(path, "twin", torch.float32, activation)
    assert_close(actual, expected, torch.float32)
    silu = run("loop", "twin", torch.float32)
    assert (silu["y"] - expected["y"]).abs().max() > 0.01


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_activations_are_those_of_transformers(activation):
    """One token and the shared expert as well: transformers' own function, token by token in fp64."""
    x_TD, ids_TK = random(3, D, seed=1, dtype=torch.float64), make_ids("flat")[:3]
    frozen, trainable = (make_experts(seed, torch.float64, False) for seed in (10, 20))
    weights_TK, act = random(3, S, seed=4, dtype=torch.float64), ACT2FN[activation]
    gate_up, down = (torch.cat(pair) for pair in zip(frozen, trainable, strict=True))

    def expert(e, x_D):
        return down[e] @ (act(gate_up[e, :f] @ x_D) * (gate_up[e, f:] @ x_D))

    rows = zip(x_TD, weights_TK, ids_TK, strict=True)
    expected = torch.stack([sum(w * expert(e, x) for w, e in zip(w_K, e_K, strict=True)) for x, w_K, e_K in rows])
    for path in ("loop", "batched", "tiled"):
        y_TD = apply_experts(x_TD, Routing(ids_TK, weights_TK), frozen, trainable, path, activation)
        torch.testing.assert_close(y_TD, expected, rtol=0, atol=1e-12)
    with torch.no_grad():  # decoding
        for t in range(3):
            routing = Routing(ids_TK[t : t + 1], weights_TK[t : t + 1])
            y_1D = apply_experts(x_TD[t : t + 1], routing, frozen, trainable, "auto", activation)
            torch.testing.assert_close(y_1D, expected[t : t + 1], rtol=0, atol=1e-12)
    whole = torch.stack([expert(0, x) for x in x_TD])
    torch.testing.assert_close(gated_ffn(x_TD, gate_up[0], down[0], activation), whole)


def test_kernels_that_know_silu_alone_are_not_chosen_for_another(monkeypatch):
    monkeypatch.setattr(fused, "runs_triton", lambda device: True)
    x_TD, experts = torch.empty(8, 16, dtype=torch.bfloat16), Experts(torch.empty(2, 32, 16), torch.empty(2, 16, 16))
    assert fused.fused_fits(x_TD, experts)
    assert not fused.fused_fits(x_TD, experts, "gelu")
    with pytest.raises(UserError, match="'fused' computes silu, and these experts 'gelu'"):
        fused.fused_path(x_TD, Routing(torch.zeros(8, 1).long(), torch.ones(8, 1)), experts, experts, "gelu")
    monkeypatch.setattr(row_ops, "runs_triton", lambda device: True)
    assert row_ops.row_ops(torch.device("cuda"), "gelu") is row_ops


def test_a_kept_graph_gives_the_same_gradients_again():
    """The tiled path gives saved activations back early, but not those that another backward pass needs."""
    x_TD, ids_TK = random(T, D, seed=1).requires_grad_(), make_ids("twin")
    trainable = make_experts(20, torch.float32, trains=True)
    y_TD = apply_experts(
        x_TD, Routing(ids_TK, random(T, S, seed=4)), make_experts(10, torch.float32, False), trainable, "tiled"
    )
    first, second = (torch.autograd.grad(y_TD.sum(), [x_TD, *trainable], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_loop_is_the_formula():
    """y_t = sum_k w_tk down_e (silu(gate_e x) * (up_e x)), token by token, in fp64."""
    x_TD, ids_TK = random(T, D, seed=1, dtype=torch.float64), make_ids("flat")
    weights_TK = random(T, S, seed=4, dtype=torch.float64)
    frozen, trainable = (make_experts(seed, torch.float64, False) for seed in (10, 20))
    gate_up, down = (torch.cat(pair) for pair in zip(frozen, trainable, strict=True))
    expected = torch.zeros_like(x_TD)
    for t in range(T):
        for k in range(S):
            e = ids_TK[t, k]
            gate, up = gate_up[e, :f] @ x_TD[t], gate_up[e, f:] @ x_TD[t]
            expected[t] += weights_TK[t, k] * (down[e] @ (gate / (1 + torch.exp(-gate)) * up))
    for path in ("loop", "batched"):
        y_TD = apply_experts(x_TD, Routing(ids_TK, weights_TK), frozen, trainable, path)  # type: ignore[arg-type]
        torch.testing.assert_close(y_TD, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("routing", ["twin", "flat"])
@pytest.mark.parametrize("path", ["auto", *RUNNABLE])
def test_the_layer_routes_by_its_router(path, routing):
    config = MoEConfig(S, S, f, S, (0,), routing, route_scale=float(S))
    x_TD = random(T, D, seed=1)
    router_RD, bias_R = random(config.num_router_rows, D, seed=2), random(config.num_router_rows, seed=3, std=0.1)
    frozen, trainable = make_experts(10, torch.float32, False), make_experts(20, torch.float32, False)
    y_TD, routing_, scores_TE = moe_ffn(
        x_TD, MoEWeights(router_RD, bias_R, Resident(frozen, trainable)), config, "routed", path
    )
    expected = route(expert_scores(x_TD @ router_RD.T, config), bias_R, config)
    assert torch.equal(routing_.expert_ids_TK.sort().values, expected.expert_ids_TK.sort().values)
    assert scores_TE is not None
    assert scores_TE.shape == (T, 2 * S)
    oracle = PATHS["loop"](x_TD, expected, frozen, trainable)
    torch.testing.assert_close(y_TD, oracle, rtol=2e-5, atol=2e-5)  # fp32, another order of summation


@pytest.mark.parametrize("path", RUNNABLE)
@pytest.mark.parametrize("mode", ["dense", "random"])
def test_without_noise_dense_and_random_modes_are_the_ffn(path, mode):
    gate_FD, up_FD, down_DF = random(S * f, D, seed=1), random(S * f, D, seed=2), random(D, S * f, seed=3)
    slices = slice_ffn(gate_FD, up_FD, down_DF, S)
    x_TD = random(T, D, seed=4)
    config = MoEConfig(S, S, f, S, (0,), route_scale=float(S))
    torch.manual_seed(0)
    y_TD, routing, scores_TE = moe_ffn(
        x_TD, MoEWeights(torch.zeros(S, D), torch.zeros(S), Resident(slices, slices)), config, mode, path
    )
    dense_TD = (torch.nn.functional.silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)) @ down_DF.T
    assert scores_TE is None
    assert ((routing.expert_ids_TK >= S).any()) == (mode == "random")
    # fp32: 96 terms whose sizes go up to that of the largest output
    assert (y_TD - dense_TD).abs().max() <= 1e-6 * 96**0.5 * dense_TD.abs().max()


def test_learned_mode_runs_the_copies_alone():
    config = MoEConfig(S, S, f, S, (0,), route_scale=float(S))
    frozen, trainable = make_experts(10, torch.float32, False), make_experts(20, torch.float32, False)
    x_TD = random(T, D, seed=4)
    y_TD, _, _ = moe_ffn(
        x_TD, MoEWeights(torch.zeros(S, D), torch.zeros(S), Resident(frozen, trainable)), config, "learned", "batched"
    )
    swapped = fixed_routing(T, "dense", config, torch.device("cpu"))
    torch.testing.assert_close(y_TD, PATHS["loop"](x_TD, swapped, trainable, frozen), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("load", LOADS)
def test_a_single_token_agrees_with_the_loop(load, dtype):
    """Without a gradient, 'auto' decodes one token by matrix-vector products on a CPU."""
    x_1D, ids_1K = random(1, D, seed=1, dtype=dtype), make_ids(load)[:1]
    routing = Routing(ids_1K, random(1, S, seed=4).sigmoid())
    frozen, trainable = make_experts(10, dtype, trains=False), make_experts(20, dtype, trains=False)
    with torch.no_grad():
        expected, actual = (apply_experts(x_1D, routing, frozen, trainable, path) for path in ("loop", "auto"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * expected.abs().max().item())


def test_shared_expert_unit_gate_and_analytic_router_by_hand():
    """y = shared(x) + sum of (1 + u_e sigmoid(l_e)) expert_e(x) + b, l_e = |silu(w_e x)(v_e x)|, top K of l + bias."""
    T, D, E, K, f, n = 5, 8, 4, 2, 3, 6
    torch.manual_seed(0)
    trainable = Experts(torch.randn(E, 2 * f, D), torch.randn(E, D, f))
    shared = SharedExpert(torch.randn(2 * n, D), torch.randn(D, n))
    router, up, scale = torch.randn(E, D), torch.randn(E, D), torch.randn(E)
    selection_bias, output_bias = torch.randn(E), torch.randn(D)
    weights = MoEWeights(
        router, selection_bias, Resident(Experts(trainable[0][:0], trainable[1][:0]), trainable), up, scale, shared,
        output_bias,
    )  # fmt: skip
    config = MoEConfig(
        0, E, f, K, (0,), routing="flat", gate="unit", router="analytic", shared_intermediate_size=n, output_bias=True
    )
    x_TD = torch.randn(T, D)
    y_TD, routing, _ = moe_ffn(x_TD, weights, config)
    for t, x in enumerate(x_TD):
        logits = (torch.nn.functional.silu(router @ x) * (up @ x)).abs()
        chosen = (logits + selection_bias).topk(K).indices
        assert set(chosen.tolist()) == set(routing.expert_ids_TK[t].tolist())
        expected = gated_ffn(x[None], *shared)[0] + output_bias
        for e in chosen:
            weight = 1 + scale[e] * logits[e].sigmoid()
            expected = expected + weight * gated_ffn(x[None], trainable[0][e], trainable[1][e])[0]
        torch.testing.assert_close(y_TD[t], expected, rtol=1e-5, atol=1e-4)  # fp32, another order of summation
