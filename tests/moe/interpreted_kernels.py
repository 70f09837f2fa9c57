"""Run: TRITON_INTERPRET=1 uv run pytest tests/moe/interpreted_kernels.py

The Triton kernels, computed by Triton's interpreter on a CPU. test_dispatch.py starts this in a process of its own.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lamella.moe.packed import Experts
from lamella.moe.paths.choose import PATHS, apply_experts
from lamella.moe.routing import Routing
from support import experts

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
FP32, BF16 = experts.TOLERANCE


# A tile of the interpreter has 32 rows: one expert with all 37 tokens has two tiles.
@pytest.mark.parametrize(
    ("path", "load", "dtype"),
    [
        *(("fused", load, FP32) for load in ("all frozen", "twin", "one full, one empty")),
        *(("fused", "twin", BF16), ("grouped", "one full, one empty", FP32), ("grouped", "twin", BF16)),
    ],
)
def test_kernels_agree_with_the_loop(path, load, dtype):
    experts.assert_close(experts.run(path, load, dtype), experts.run("loop", load, dtype), dtype)


@pytest.mark.parametrize(("D", "f"), [(24, 40), (17, 5)])
def test_widths_that_fill_no_tile(D, f):
    """Tiles of the interpreter are 16 columns wide."""
    S, T = 2, 9
    x_TD = experts.random(T, D, seed=1)
    shapes = [(S, 2 * f, D), (S, D, f)]
    frozen, trainable = (Experts(*(experts.random(*s, seed=seed, std=0.3) for s in shapes)) for seed in (2, 3))
    routing = Routing(torch.arange(S) + S * torch.randint(2, (T, S)), torch.rand(T, S))
    results = []
    for path in ("loop", "fused"):
        leaves = [t.clone().requires_grad_() for t in (x_TD, *trainable)]
        y_TD = apply_experts(leaves[0], routing, frozen, Experts(*leaves[1:]), path)
        y_TD.backward(experts.random(T, D, seed=4))
        results.append([y_TD.detach(), *(t.grad for t in leaves)])
    for expected, actual in zip(*results, strict=True):
        # fp32, another order of summation
        torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["frozen", "trainable"])
def test_one_kind_of_expert_alone(kind):
    """No frozen, or no trainable experts: a packed tensor of length 0."""
    S = experts.S
    all_experts = experts.make_experts(10, torch.float32, True)
    none = Experts(*(t.detach()[:0] for t in all_experts))
    x_TD = experts.random(9, experts.D, seed=1)
    routing = Routing(torch.rand(9, S).topk(2).indices, torch.rand(9, 2))
    results = []
    for path in ("loop", "fused", "grouped"):
        pair = (all_experts, none) if kind == "frozen" else (none, all_experts)
        y_TD = apply_experts(x_TD, routing, *pair, path)
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), all_experts)])
    for expected, fused, grouped in zip(*results, strict=True):
        atol = 2e-5 * expected.abs().max().item()  # fp32, another order of summation
        torch.testing.assert_close(fused, expected, rtol=0, atol=atol)
        torch.testing.assert_close(grouped, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("path", ["fused", "grouped"])
def test_nothing_asks_the_host(path):
    experts.forward_backward(path)


class NoSynchronisation(TorchDispatchMode):
    """On a GPU these operators wait for the device: their result's value or shape goes to the host."""

    names = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.names), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["fused", "grouped"])
def test_one_graph_recomputed_and_without_synchronisation(path, monkeypatch):
    expected = experts.run("loop", "twin", BF16)
    original = PATHS[path]

    def recomputed(*args):
        with NoSynchronisation():
            return checkpoint(original, *args, use_reentrant=False)

    def compiled(*args):
        return torch.compile(original, backend="aot_eager", fullgraph=True)(*args)

    for name, function in (("recomputed", recomputed), ("compiled", compiled)):
        monkeypatch.setitem(PATHS, name, function)
        experts.assert_close(experts.run(name, "twin", BF16), expected, BF16)


def test_the_same_bits_each_time():
    """No atomic additions: recomputation and resumed runs rely on it."""
    first, second = (experts.run("fused", "flat", BF16) for _ in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())
