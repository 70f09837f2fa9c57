"""What must hold before a Triton kernel starts; tests/moe/test_moe_gpu.py starts them on a second GPU."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

import lamella.moe.paths
from lamella.errors import UserError
from lamella.moe.packed import Experts
from lamella.moe.paths.fused import fused_path
from lamella.moe.paths.launch import on_device_of
from lamella.moe.routing import Routing

PATHS = Path(lamella.moe.paths.__file__).parent


def launches(tree: ast.AST, kernels: set[str]) -> list[ast.Call]:
    """Calls of the form kernel[grid](...)."""
    subscripted = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
    return [n for n in subscripted if ast.unparse(n.func.value).rpartition(".")[2] in kernels]  # type: ignore[attr-defined]


def kernels_of(tree: ast.AST) -> set[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


def test_every_launch_is_on_the_device_of_its_tensors():
    """Triton launches on the current device, which on a machine with several GPUs may be another one."""
    trees = {file.name: ast.parse(file.read_text()) for file in PATHS.glob("*.py")}
    kernels = set().union(*(kernels_of(tree) for tree in trees.values()))
    started = [call for tree in trees.values() for call in launches(tree, kernels)]
    guarded = [
        call
        for tree in trees.values()
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and ast.unparse(block.items[0].context_expr).startswith("on_device_of(")
        for call in launches(block, kernels)
        if ast.unparse(block.items[0].context_expr) == f"on_device_of({ast.unparse(call.args[0])})"
    ]
    assert len(started) >= 8
    assert [ast.unparse(call) for call in started if call not in guarded] == []


def test_on_a_cpu_there_is_nothing_to_set():
    with on_device_of(torch.zeros(1)) as nothing:
        assert nothing is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("which", ["input", "frozen", "trainable"])
def test_fused_takes_one_dtype(which):
    def made(name: str, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32 if name == which else torch.bfloat16)

    frozen, trainable = (Experts(made(kind, 2, 16, 8), made(kind, 2, 8, 8)) for kind in ("frozen", "trainable"))
    routing = Routing(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    with pytest.raises(UserError, match="of bfloat16 and float32; cast"):
        fused_path(made("input", 3, 8), routing, frozen, trainable)
