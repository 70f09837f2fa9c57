"""One token and a few on a CPU: routed in plain numbers, computed with few calls, as every path computes them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from lamella.architecture.moe import MoEConfig
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import PATHS
from lamella.moe.paths.decode import decode_path, few_experts
from lamella.moe.routing import Routing, expert_scores, route
from lamella.moe.routing_one import route_one

D, f, S, K = 32, 16, 4, 3


def config(routing: str, gate: str, norm: bool) -> MoEConfig:
    experts = {"num_frozen_experts": S, "num_trainable_experts": S, "moe_intermediate_size": f, "moe_layers": (0,)}
    twin = {"routing": routing, "num_experts_per_tok": S if routing == "twin" else K}
    return MoEConfig(**experts, **twin, gate=gate, norm_topk_prob=norm, route_scale=2.5)  # type: ignore[arg-type]


CONFIGS = [
    config(*kind)
    for kind in itertools.product(("twin", "flat"), ("sigmoid", "softmax", "unit"), (True, False))
    if kind[:2] not in (("twin", "softmax"), ("twin", "unit"))
]


@pytest.mark.parametrize("moe", CONFIGS, ids=lambda c: f"{c.routing} {c.gate} {c.norm_topk_prob}")
def test_one_token_goes_where_the_router_sends_it(moe: MoEConfig) -> None:
    """The same experts and weights as the routing of many tokens, biased and not, at ties of twins, too."""
    torch.manual_seed(0)
    R = S if moe.routing == "twin" else 2 * S
    gate_scale_R = torch.randn(R) if moe.gate == "unit" else None
    for bias_R in (torch.zeros(R), 0.3 * torch.randn(R)):
        logits_TR = torch.randn(200, R)
        if moe.routing == "twin":
            logits_TR[:3] = 0
        expected = route(expert_scores(logits_TR, moe), bias_R, moe, gate_scale_R)
        given = None if gate_scale_R is None else gate_scale_R.tolist()
        for t, logits_R in enumerate(logits_TR.tolist()):
            ids, weights = route_one(logits_R, bias_R.tolist(), moe, given)
            order = sorted(range(len(ids)), key=ids.__getitem__)
            ids_K, at_K = expected.expert_ids_TK[t].sort()
            assert [ids[k] for k in order] == ids_K.tolist()
            got = torch.tensor([weights[k] for k in order])
            torch.testing.assert_close(got, expected.weights_TK[t][at_K], rtol=1e-5, atol=1e-6)  # float64 and float32


@pytest.mark.parametrize("tokens", [1, 2, 7, 60])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_few_tokens_are_computed_as_by_the_loop(tokens: int, activation: str) -> None:
    """Whatever experts they chose: none, all the same, all different."""
    torch.manual_seed(tokens)
    frozen, trainable = (Experts(torch.randn(S, 2 * f, D), torch.randn(S, D, f)) for _ in range(2))
    gate_up, down = (a.unbind(0) + b.unbind(0) for a, b in zip(frozen, trainable, strict=True))
    for ids_TK in (torch.rand(tokens, 2 * S).topk(K).indices, torch.tensor([[5, 1, 0]]).expand(tokens, K)):
        routing = Routing(ids_TK, torch.rand(tokens, K))
        x_TD = torch.randn(tokens, D)
        expected = PATHS["loop"](x_TD, routing, frozen, trainable, activation)  # type: ignore[arg-type]
        near = {"rtol": 1e-5, "atol": 1e-4}  # float32, outputs of about 100, another order of 48 terms
        torch.testing.assert_close(few_experts(x_TD, routing, gate_up, down, activation), expected, **near)  # type: ignore[arg-type]
        if tokens == 1:
            one = decode_path(x_TD, routing, frozen, trainable, activation)  # type: ignore[arg-type]
            torch.testing.assert_close(one, expected, **near)


def test_the_order_of_twins_is_that_of_their_slices() -> None:
    """Column i holds pair i, as offload and reports have it."""
    moe = dataclasses.replace(CONFIGS[0], route_scale=1.0)
    ids, _ = route_one([1.0, -1.0, 2.0, -2.0], [0.0] * S, moe)
    assert ids == [S, 1, S + 2, 3]
