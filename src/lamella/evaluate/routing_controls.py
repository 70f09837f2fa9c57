"""What chance does to a model: experts drawn at random, the copies without noise.

In twin routing one of {slice i, copy i} is drawn for every i, so every slice is summed once and the model stays the
dense one. In flat routing any K of the 2S experts are drawn: some slices twice, others not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lamella.architecture.moe import Mode, RoutingKind
from lamella.data.packing import PackedSamples
from lamella.errors import UserError
from lamella.evaluate.checkpoints import has_moe_layers
from lamella.evaluate.perplexity import perplexity


@dataclass(frozen=True)
class RoutingControls:
    dense_perplexity: float
    twin_ppl_ratio: float
    """Perplexity with one of each pair drawn 50/50, over the dense model's."""
    flat_ppl_ratio: float
    """Perplexity with any K of the experts drawn, over the dense model's."""
    tokens: int


def routing_controls(
    model: Any,
    samples: PackedSamples,
    tokenizer: Any,
    max_tokens: int | None = None,
    dense_perplexity: float | None = None,
    seed: int = 0,
) -> RoutingControls:
    """Both ratios on the same weights. Without `dense_perplexity` the model's own mode "dense" is the measure.

    Raises:
        UserError: a dense model, or one whose slices and copies do not pair up.
    """
    if not has_moe_layers(model):
        raise UserError("routing controls need a converted model; this one is dense")
    if dense_perplexity is None:
        with mode(model, "dense"):
            dense_perplexity = perplexity(model, samples, tokenizer, max_tokens).perplexity
    ratios = {}
    for kind in ("twin", "flat"):
        with copies_without_noise(model), routed_as(model, kind), mode(model, "random"), torch.random.fork_rng():
            torch.manual_seed(seed)
            result = perplexity(model, samples, tokenizer, max_tokens)
            ratios[kind] = result.perplexity / dense_perplexity
    return RoutingControls(dense_perplexity, ratios["twin"], ratios["flat"], result.tokens)


@contextmanager
def copies_without_noise(model: Any) -> Iterator[None]:
    """Inside, every trainable expert is its frozen slice: the same tensor under both names, so nothing is copied."""
    kept = []
    for layer in model.moe_layers:
        if layer.config.num_frozen_experts != layer.config.num_trainable_experts:
            raise UserError("the slices and their copies do not pair up; this control needs one copy of each slice")
        kept.append((layer.experts, layer.experts.trainable))
    try:
        for experts, _ in kept:
            _set_trainable(experts, experts.frozen)
        yield
    finally:
        for experts, trainable in kept:
            _set_trainable(experts, trainable)


def _set_trainable(experts: Any, tensors: Any) -> None:
    for name, tensor in zip(tensors._fields, tensors, strict=True):
        setattr(experts, f"trainable_{name}", tensor)


@contextmanager
def mode(model: Any, name: Mode) -> Iterator[None]:
    """Inside, every MoE layer is in this mode, and all attention experts."""
    layers = [*model.moe_layers, *model.attention_experts]
    before = [layer.mode for layer in layers]
    model.set_mode(name)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.mode = old


@contextmanager
def routed_as(model: Any, routing: RoutingKind) -> Iterator[None]:
    """Inside, every MoE layer draws by this kind of routing (for mode "random": a router has other rows in each)."""
    before = [layer.config for layer in model.moe_layers]
    try:
        for layer in model.moe_layers:
            layer.config = dataclasses.replace(layer.config, routing=routing)
        yield
    finally:
        for layer, old in zip(model.moe_layers, before, strict=True):
            layer.config = old
