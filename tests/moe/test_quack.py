"""The `quack` path: what it asks of quack-kernels' products gives the loop's results. Their kernels need a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from lamella.errors import UserError
from lamella.moe.packed import Experts
from lamella.moe.paths import measured, quack_path
from lamella.moe.paths.choose import PATHS, fitting_paths
from lamella.moe.paths.grouped import Kind, by_products
from lamella.moe.paths.measured import PathFailed, fastest
from support import experts, quack_products


@pytest.fixture
def on_cpu(monkeypatch):
    """The path as it is on a GPU, but for who computes the products."""
    calls = []

    def gemm(*arguments, **options):
        calls.append(options)
        return quack_products.gemm(*arguments, **options)

    def path(x_TD, routing, frozen, trainable, activation="silu"):
        return by_products(Kind(quack_path.QuackProducts(gemm), activation), x_TD, routing, frozen, trainable)

    monkeypatch.setitem(PATHS, "quack", path)
    return calls


@pytest.mark.parametrize("load", experts.LOADS)
@pytest.mark.parametrize("dtype", experts.TOLERANCE)
def test_it_agrees_with_the_loop(load, dtype, on_cpu):
    experts.assert_close(experts.run("quack", load, dtype), experts.run("loop", load, dtype), dtype)


def test_frozen_experts_cost_no_weight_gradient_and_nothing_is_gathered_first(on_cpu):
    experts.run("quack", "twin", torch.float32)
    sums = [options for options in on_cpu if options.get("cu_seqlens_k") is not None]
    rows = [options for options in on_cpu if options.get("cu_seqlens_m") is not None]
    assert len(sums) == 2  # gate and up, and down, of the trainable half
    assert all(options["A_idx"] is not None for options in sums)
    assert len(rows) == 8  # two forwards and two backwards in each half
    assert sum(options["A_idx"] is not None for options in rows) == 4


def test_it_is_refused_where_it_cannot_run():
    x_TD = torch.zeros(4, 16)
    packed = Experts(torch.zeros(1, 16, 16), torch.zeros(1, 16, 8))
    assert not quack_path.quack_fits(x_TD, packed)
    assert "quack" not in fitting_paths(x_TD, packed)
    with pytest.raises(UserError, match="needs the package quack-kernels"):
        experts.run("quack", "twin", torch.bfloat16)


def test_kernels_that_fail_leave_the_other_paths(tmp_path, monkeypatch, capsys):
    """A package that cannot be imported or cannot compute the layer ends no training."""
    monkeypatch.setitem(sys.modules, "quack", None)
    with pytest.raises(PathFailed, match="cannot be imported"):
        quack_path._gemm()

    def fails(*_):
        raise PathFailed("no such instruction")

    measured.forget()
    T = measured.LEAST_TOKENS
    routing = experts.Routing(torch.arange(2).expand(T, 2), torch.ones(T, 2))
    packed = [Experts(torch.zeros(1, 16, 16), torch.zeros(1, 16, 8)) for _ in range(2)]
    paths = {"quack": fails, "loop": PATHS["loop"]}
    assert fastest(torch.zeros(T, 16), routing, *packed, paths, file=tmp_path / "paths.json") == "loop"
    assert "no such instruction" in capsys.readouterr().err
    measured.forget()
