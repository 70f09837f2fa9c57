"""What chance does to a model: experts drawn at random, the copies without noise.

In twin routing one of {slice i, copy i} is drawn for every i, so every slice is summed once and the model stays the
dense one. In flat routing any K of the 2S experts are drawn: some slices twice, others not at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lamella.architecture.moe import Mode, RoutingKind
from lamella.data.packing import PackedSamples
from lamella.errors import UserError
from lamella.evaluate.checkpoints import has_moe_layers
from lamella.evaluate.perplexity import perplexity
from lamella.hf.models import ConvertedForCausalLM


@dataclass(frozen=True)
class RoutingControls:
    dense_perplexity: float
    twin_ppl_ratio: float
    """Perplexity with one of each pair drawn 50/50, over the dense model's."""
    flat_ppl_ratio: float
    """Perplexity with any K of the experts drawn, over the dense model's."""
    tokens: int


def routing_controls(
    model: PreTrainedModel,
    samples: PackedSamples,
    tokenizer: PreTrainedTokenizerBase,
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
def copies_without_noise(model: ConvertedForCausalLM) -> Iterator[None]:
    """Inside, every trainable expert computes as its frozen slice; nothing is copied."""
    for layer in model.moe_layers:
        if layer.config.num_frozen_experts != layer.config.num_trainable_experts:
            raise UserError("the slices and their copies do not pair up; this control needs one copy of each slice")
    with model.computing.temporarily(dataclasses.replace(model.computing, exact_copies=True)):
        yield


@contextmanager
def mode(model: ConvertedForCausalLM, name: Mode) -> Iterator[None]:
    """Inside, every MoE layer is in this mode, and all attention experts."""
    with model.computing.temporarily(dataclasses.replace(model.computing, mode=name)):
        yield


@contextmanager
def routed_as(model: ConvertedForCausalLM, routing: RoutingKind) -> Iterator[None]:
    """Inside, every MoE layer draws by this kind of routing (for mode "random": a router has other rows in each)."""
    with model.computing.temporarily(dataclasses.replace(model.computing, drawn_as=routing)):
        yield
