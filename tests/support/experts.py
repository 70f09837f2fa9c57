"""A layer of experts under every load, with all gradients: what its paths are compared on.

Shapes: T tokens, D model width, S slices, f neurons per slice, K = S experts per token.
"""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from lamella.architecture.moe import Activation
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import apply_experts
from lamella.moe.routing import Routing, router_logits

S, T, D, f = 4, 37, 16, 24
# Relative to the largest entry of each tensor. fp32: sums of at most 37 * 4 terms in another order, 2e-5 is 170 eps.
# bf16: each of a token's 4 slices and of the products in them is rounded to 8 bits (2^-9 each); 2e-2 is 10 roundings.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def random(*shape, seed, std=1.0, dtype=torch.float32):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def make_experts(seed: int, dtype: torch.dtype, trains: bool) -> Experts:
    shapes = [(S, 2 * f, D), (S, D, f)]
    return Experts(
        *(random(*s, seed=seed + i, std=0.3, dtype=dtype).requires_grad_(trains) for i, s in enumerate(shapes))
    )


def make_ids(load: str) -> torch.Tensor:
    """[T, K] expert ids, K = S."""
    generator = torch.Generator().manual_seed(7)
    if load == "all frozen":
        return torch.arange(S).expand(T, S)
    if load == "all trainable":
        return torch.arange(S, 2 * S).expand(T, S)
    if load == "twin":
        return torch.arange(S) + S * torch.randint(2, (T, S), generator=generator)
    if load == "flat":
        return torch.rand(T, 2 * S, generator=generator).topk(S).indices
    assert load == "one full, one empty"
    scores_TE = torch.rand(T, 2 * S, generator=generator)
    scores_TE[:, 1], scores_TE[:, S + 2] = 2, -1
    return scores_TE.topk(S).indices


LOADS = ["all frozen", "all trainable", "twin", "flat", "one full, one empty"]


def run(path: str, load: str, dtype: torch.dtype, activation: Activation = "silu") -> dict[str, torch.Tensor]:
    """The output and every gradient, through gate weights that come from a router."""
    x_TD = random(T, D, seed=1, dtype=dtype).requires_grad_()
    router_ED = random(2 * S, D, seed=2, std=0.2).requires_grad_()
    frozen, trainable = make_experts(10, dtype, trains=False), make_experts(20, dtype, trains=True)
    ids_TK = make_ids(load)
    weights_TK = router_logits(x_TD, router_ED).sigmoid().gather(1, ids_TK)
    y_TD = apply_experts(x_TD, Routing(ids_TK, weights_TK), frozen, trainable, path, activation)  # type: ignore[arg-type]
    (y_TD.float() * random(T, D, seed=3)).sum().backward()
    grads = {"x": x_TD.grad, "router": router_ED.grad, "gate_up": trainable[0].grad, "down": trainable[1].grad}
    assert frozen[0].grad is None
    assert frozen[1].grad is None
    return {"y": y_TD.detach()} | grads


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, value in expected.items():
        got = actual[name]
        assert got is not None, f"{name} takes no gradient"
        assert got.dtype == value.dtype
        error = (got.float() - value.float()).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(value.float().abs().max().item(), 1e-6), name


def forward_backward(path: str) -> None:
    """A step in which a value that the host asks for is an error: the tensors hold none."""
    dtype = torch.bfloat16
    with FakeTensorMode():
        x_TD = torch.empty(T, D, dtype=dtype, requires_grad=True)
        weights_TK = torch.empty(T, S, requires_grad=True)
        ids_TK = torch.empty(T, S, dtype=torch.int64)
        frozen = Experts(torch.empty(S, 2 * f, D, dtype=dtype), torch.empty(S, D, f, dtype=dtype))
        trainable = Experts(*(torch.empty_like(t).requires_grad_() for t in frozen))
        y_TD = apply_experts(x_TD, Routing(ids_TK, weights_TK), frozen, trainable, path)  # type: ignore[arg-type]
        y_TD.backward(torch.empty_like(y_TD))
        for leaf in (y_TD, x_TD, weights_TK, *trainable):
            assert leaf is y_TD or leaf.grad.shape == leaf.shape
