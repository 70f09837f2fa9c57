"""Sorting rows by expert and, in the paths built on it, no question to the host, compilation and checkpointing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from lamella.errors import UserError
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import PATHS, apply_experts, fitting_paths
from lamella.moe.paths.dispatch import dispatch, pair_range, to_rows
from lamella.moe.paths.grouped import split_halves
from lamella.moe.paths.row_ops import HAS_TRITON
from lamella.moe.routing import Routing
from support import experts

S, T, D, f = experts.S, experts.T, experts.D, experts.f


@pytest.mark.parametrize("load", experts.LOADS)
def test_dispatch_sorts_by_expert_then_token(load):
    ids_TK = experts.make_ids(load)
    d = dispatch(ids_TK, 2 * S)
    order_N = ids_TK.flatten().argsort(stable=True)
    assert torch.equal(d.token_N, order_N // S)
    assert torch.equal(d.slot_TK.flatten()[order_N], torch.arange(T * S))
    assert torch.equal(d.ends_E, torch.bincount(ids_TK.flatten(), minlength=2 * S).cumsum(0))
    values_TK = torch.rand(T, S)
    assert torch.equal(to_rows(values_TK, d), values_TK.flatten()[order_N])


def test_each_half_begins_at_row_0():
    ids_TK = experts.make_ids("twin")
    d = dispatch(ids_TK, 2 * S)
    weights_N = torch.arange(T * S, dtype=torch.float32)
    frozen, trainable = split_halves(d, weights_N, S)
    split = int(frozen.ends_E[-1])
    assert torch.equal(trainable.token_N[: T * S - split], d.token_N[split:])
    assert torch.equal(trainable.weights_N[: T * S - split], weights_N[split:])
    assert torch.equal(trainable.ends_E, d.ends_E[S:] - split)
    assert [len(half.ends_E) for half in split_halves(d, weights_N, 0)] == [2 * S]


def test_grouped_asks_the_host_for_nothing():
    experts.forward_backward("grouped")


def test_paths_that_ask_the_host_are_told():
    """The check above is one: the padded path counts the rows of the fullest expert."""
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        experts.forward_backward("batched")


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize(
    ("dtype", "width", "path"),
    [(torch.bfloat16, 16, "fused"), (torch.float32, 16, "grouped"), (torch.bfloat16, 18, "batched")],
)
def test_auto_on_a_gpu(dtype, width, path):
    with FakeTensorMode():
        x_TD = torch.empty(T, width, device="cuda", dtype=dtype)
        assert fitting_paths(x_TD, Experts(*(torch.empty(1, 1, f, dtype=dtype) for _ in range(2))))[0] == path
    assert fitting_paths(torch.empty(T, width), Experts(torch.empty(1, 1, f), torch.empty(1, 1, f))) == ["tiled"]


@pytest.mark.slow
def test_grouped_compiles_to_one_graph(monkeypatch):
    def compiled(*args):
        return torch.compile(PATHS["grouped"], backend="aot_eager", fullgraph=True)(*args)

    expected = experts.run("loop", "twin", torch.bfloat16)
    monkeypatch.setitem(PATHS, "compiled", compiled)
    experts.assert_close(experts.run("compiled", "twin", torch.bfloat16), expected, torch.bfloat16)


@pytest.mark.parametrize("path", ["loop", "batched", "grouped", "tiled"])
def test_recomputed_in_the_backward_pass(path, monkeypatch):
    def recomputed(*args):
        return checkpoint(PATHS[path], *args, use_reentrant=False)

    expected = experts.run(path, "twin", torch.float32)
    monkeypatch.setitem(PATHS, "recomputed", recomputed)
    actual = experts.run("recomputed", "twin", torch.float32)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@pytest.mark.parametrize("path", ["loop", "batched", "grouped", "tiled"])
@pytest.mark.parametrize("count", [1, 2])
def test_ranges_of_pairs_add_up(path, count, monkeypatch):
    """Pairs on several ranks: each computes its own, the sum of the outputs is the layer's, the gradients likewise."""

    def in_ranges(x_TD, routing, frozen, trainable, activation):
        parts = []
        for first in range(0, S, count):
            own = [Experts(*(t[first : first + count] for t in packed)) for packed in (frozen, trainable)]
            parts.append(apply_experts(x_TD, pair_range(routing, first, count), *own, path, activation))
        return sum(parts)

    monkeypatch.setitem(PATHS, "in ranges", in_ranges)
    expected = experts.run("loop", "twin", torch.float32)
    experts.assert_close(experts.run("in ranges", "twin", torch.float32), expected, torch.float32)


def test_grouped_keeps_no_more_than_a_dense_ffn():
    """Bytes saved for the backward pass, against gate, up, silu(gate) and hidden of the dense FFN and its input."""
    saved = {}

    def count(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        x_TD = torch.rand(512, 64, requires_grad=True)
        packed = [Experts(torch.rand(S, 2 * 64, 64), torch.rand(S, 64, 64)) for _ in range(2)]
        ids_TK = torch.arange(S) + S * torch.randint(2, (512, S))
        apply_experts(x_TD, Routing(ids_TK, torch.rand(512, S)), *packed, "grouped")
    weights = sum(t.nbytes for e in packed for t in e)
    dense = 4 * 512 * (64 + 4 * S * 64)
    rows_bookkeeping = 512 * S * (8 + 2 * (8 + 4))
    assert 0 < sum(saved.values()) - weights <= dense + rows_bookkeeping + 1024


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.slow
def test_triton_kernels_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, hence another process."""
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Layer(torch.nn.Module):
    def __init__(self, path: str):
        super().__init__()
        frozen, trainable = (experts.make_experts(seed, torch.float32, False) for seed in (10, 20))
        self.frozen = torch.nn.ParameterList(torch.nn.Parameter(t, requires_grad=False) for t in frozen)
        self.trainable = torch.nn.ParameterList(trainable)
        self.path = path

    def forward(self, x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        return apply_experts(x_TD, routing, Experts(*self.frozen), Experts(*self.trainable), self.path)


@pytest.mark.parametrize("path", ["grouped", "tiled"])
def test_sharded_by_fsdp(path, one_rank):
    """FSDP gathers the packed tensors before the layer runs; the gradients come back sharded."""
    x_TD = experts.random(T, D, seed=1)
    routing = Routing(experts.make_ids("twin"), torch.rand(T, S))
    plain, sharded = Layer(path), fully_shard(Layer(path), mesh=one_rank)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
    for layer in (plain, sharded):
        layer(x_TD, routing).square().sum().backward()
    for expected, actual in zip(plain.parameters(), sharded.parameters(), strict=True):
        assert (expected.grad is None) == (actual.grad is None) == (not expected.requires_grad)
        assert expected.grad is None or torch.equal(actual.grad.full_tensor(), expected.grad)


def test_fused_says_what_it_needs():
    with pytest.raises(UserError, match="needs a GPU"):
        experts.run("fused", "twin", torch.float32)
