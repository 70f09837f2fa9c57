"""Two-matrix experts (GPT-2, OPT): the formula by hand, gradients, routing of every kind, a shared expert."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from lamella.architecture.moe import Activation, MoEConfig
from lamella.errors import UserError
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.experts import MoEWeights, Resident, moe_ffn
from lamella.moe.routing import Routing
from lamella.moe.two_matrix import TwoMatrixExperts, TwoMatrixShared, two_matrix_path

S, T, D, f = 4, 19, 16, 12
SCALAR = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}
SCALAR["gelu_pytorch_tanh"] = SCALAR["gelu_new"]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def experts(count: int, seed: int) -> TwoMatrixExperts:
    return TwoMatrixExperts(
        random(count, f, D, seed=seed), random(count, f, seed=seed + 1), random(count, D, f, seed=seed + 2)
    )


def by_hand(x_D: Tensor, up_fD: Tensor, up_bias_f: Tensor, down_Df: Tensor, activation: str) -> Tensor:
    hidden = [SCALAR[activation](float(row @ x_D + bias)) for row, bias in zip(up_fD, up_bias_f, strict=True)]
    return down_Df @ torch.tensor(hidden, dtype=torch.float64)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_the_formula_token_by_token(activation: Activation) -> None:
    x_TD, frozen, trainable = random(T, D, seed=1), experts(S, 10), experts(S, 20)
    ids_TK = torch.rand(T, 2 * S, generator=torch.Generator().manual_seed(3)).topk(3).indices
    weights_TK = random(T, 3, seed=4)
    y_TD = two_matrix_path(x_TD, Routing(ids_TK, weights_TK), frozen, trainable, activation)
    both = [torch.cat(pair) for pair in zip(frozen, trainable, strict=True)]
    for t in range(T):
        chosen = zip(ids_TK[t].tolist(), weights_TK[t], strict=True)
        expected = sum(w * by_hand(x_TD[t], *(part[e] for part in both), activation) for e, w in chosen)
        torch.testing.assert_close(y_TD[t], expected, rtol=0, atol=1e-11)  # fp64 sums of 36 terms up to 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_are_those_of_transformers_bit_for_bit(activation: Activation, dtype: torch.dtype) -> None:
    x = random(1000, seed=1, dtype=dtype)
    assert torch.equal(ACTIVATIONS[activation](x), ACT2FN[activation](x))


@pytest.mark.slow
@pytest.mark.parametrize("num_frozen", [0, S])
def test_gradients_are_those_of_finite_differences(num_frozen: int) -> None:
    """Through the gate weights too; an expert without tokens has the gradient zero, frozen ones have none."""
    trainable = TwoMatrixExperts(*(tensor.requires_grad_() for tensor in experts(S, 20)))
    frozen = experts(num_frozen, 10)
    x_TD, weights_TK = random(5, D, seed=1).requires_grad_(), random(5, 2, seed=4).requires_grad_()
    ids_TK = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2]]) + num_frozen  # nobody chooses the last expert

    def output(x_TD: Tensor, weights_TK: Tensor, *packed: Tensor) -> Tensor:
        return two_matrix_path(x_TD, Routing(ids_TK, weights_TK), frozen, TwoMatrixExperts(*packed), "gelu_new")

    assert torch.autograd.gradcheck(output, (x_TD, weights_TK, *trainable))
    output(x_TD, weights_TK, *trainable).sum().backward()
    for tensor in trainable:
        assert tensor.grad is not None
        assert tensor.grad[:-1].any()
        assert not tensor.grad[-1].any()


def sliced(up_FD: Tensor, up_bias_F: Tensor, down_DF: Tensor) -> TwoMatrixExperts:
    return TwoMatrixExperts(
        up_FD.view(S, f, D), up_bias_F.view(S, f), down_DF.view(D, S, f).transpose(0, 1).contiguous()
    )


@pytest.mark.parametrize("mode", ["dense", "learned", "random", "routed"])
def test_slices_and_copies_in_twin_routing_are_the_dense_ffn(mode: str) -> None:
    up_FD, up_bias_F, down_DF = random(S * f, D, seed=1), random(S * f, seed=2), random(D, S * f, seed=3)
    x_TD, down_bias_D = random(T, D, seed=4), random(D, seed=5)
    slices = sliced(up_FD, up_bias_F, down_DF)
    config = MoEConfig(S, S, f, S, (0,), route_scale=float(S), output_bias=True, gated=False, activation="gelu")
    weights = MoEWeights(torch.zeros(S, D), torch.zeros(S), Resident(slices, slices), output_bias_D=down_bias_D)
    torch.manual_seed(0)
    y_TD, routing, _ = moe_ffn(x_TD, weights, config, mode)  # type: ignore[arg-type]
    assert (routing.expert_ids_TK >= S).any() == (mode in ("learned", "random"))
    dense_TD = F.linear(F.gelu(F.linear(x_TD, up_FD, up_bias_F)), down_DF, down_bias_D)
    torch.testing.assert_close(y_TD, dense_TD, rtol=0, atol=1e-5)  # the weights of a router are float32: 24 bits


def test_a_partitioned_layer_with_a_shared_expert_by_hand() -> None:
    """No frozen experts, unit gates, analytic router: y = shared(x) + sum (1 + u sigmoid(l)) expert(x) + bias."""
    E, K, n = 5, 2, 8
    trainable, none = experts(E, 20), experts(0, 10)
    shared = TwoMatrixShared(random(n, D, seed=1), random(n, seed=2), random(D, n, seed=3))
    router, up, scale, bias_D = (random(*shape, seed=30 + i) for i, shape in enumerate([(E, D), (E, D), (E,), (D,)]))
    weights = MoEWeights(router, torch.zeros(E), Resident(none, trainable), up, scale, shared, bias_D)
    config = MoEConfig(
        0, E, f, K, (0,), "flat", "unit", router="analytic", shared_intermediate_size=n, output_bias=True,
        gated=False, activation="relu",
    )  # fmt: skip
    x_TD = random(T, D, seed=4)
    y_TD, _, _ = moe_ffn(x_TD, weights, config)
    for t, x in enumerate(x_TD):
        logits = (F.silu(router @ x) * (up @ x)).abs()
        expected = by_hand(x, *shared, "relu") + bias_D
        for e in logits.topk(K).indices:
            weight = 1 + scale[e] * logits[e].sigmoid()
            expected = expected + weight * by_hand(x, *(part[e] for part in trainable), "relu")
        torch.testing.assert_close(
            y_TD[t], expected, rtol=1e-5, atol=1e-3
        )  # the weights are float32, outputs up to 1e3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": False, "activation": "gelu_fast"}, "did you mean 'gelu'"),
    ],
)
def test_bad_configs(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        MoEConfig(S, S, f, S, (0,), **changes)
