"""What a model keeps alive once a backward pass has freed its graph: nothing but its parameters and buffers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from support.models import HEADS, tiny_moe
from support.titan import load_titan


def _kept(value: object) -> Iterator[Tensor]:
    """The tensors in an attribute of a module, those in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _kept(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _kept(item)


def graphs_kept(model: nn.Module) -> list[str]:
    """Attributes of modules, parameters aside, that hold a tensor with a graph, and so every activation behind it."""
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute != "_parameters"
        for tensor in _kept(value)
        if tensor.grad_fn is not None
    ]


@pytest.mark.parametrize("checkpointing", [None, SelectiveAC, FullAC])
def test_no_graph_outlives_the_backward_pass(checkpointing, tmp_path):
    """torchtitan recomputes whole blocks, so whatever a repeated forward stores holds all of a layer's activations."""
    tiny_moe("llama", tmp_path, heads=HEADS)
    model = load_titan(tmp_path).train()
    if checkpointing is not None:
        checkpointing.Config().build(dump_folder="").apply(model)
    model(torch.arange(32).view(2, 16)).square().mean().backward()
    assert model.moe_layers[0].router.weight.grad.any()
    assert graphs_kept(model) == []


def test_no_graph_outlives_the_backward_pass_in_transformers(tmp_path):
    model = tiny_moe("llama", tmp_path, heads=HEADS).train()
    model(torch.arange(32).view(2, 16)).logits.square().mean().backward()
    assert model.moe_layers[0].last_routing.expert_ids_TK.shape == (32, 4)
    assert graphs_kept(model) == []
