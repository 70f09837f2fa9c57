"""Low-rank deltas in a training run: which model gets them, and how they start."""

from __future__ import annotations

from pathlib import Path

import torch
from torchtitan.components.checkpointer.utils import canonical_fqn

from lamella.architecture.moe_tensors import is_lora
from lamella.moe.noise import noise_generator
from lamella.recipe.training import Recipe
from lamella.titan.config import read_hf_config
from lamella.titan.decoder import LamellaDecoder
from lamella.train.balance import fill


def add_lora(recipe: Recipe, config: LamellaDecoder.Config) -> None:
    """Give the layers of the config the recipe's deltas; the two fit (`lamella.plan.fit`)."""
    for layer in config.layers:
        if recipe.lora is not None and layer.moe_layer is not None:
            layer.moe_layer.moe = layer.moe_layer.moe.with_lora(recipe.lora.rank, recipe.lora.alpha)


def is_new(recipe: Recipe) -> bool:
    """Whether the run begins with deltas that the model's folder does not hold."""
    moe = read_hf_config(Path(recipe.model)).moe
    return recipe.lora is not None and moe is not None and not moe.lora_rank


@torch.no_grad()
def start_lora(model: LamellaDecoder, seed: int) -> None:
    """B is zero, so the deltas are; A has variance 1 / its width, the same on any number of ranks."""
    lora = [(name, parameter) for name, parameter in model.named_parameters() if is_lora(name)]
    for name, parameter in lora:
        values = torch.zeros(parameter.shape)
        if name.endswith("_a"):
            # activation checkpointing puts a wrapper's name into the path
            generator = noise_generator(canonical_fqn(name), seed)
            values.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        fill(parameter, values)
