"""Low-rank deltas in a training run: which model gets them, and how they start."""

from __future__ import annotations

from pathlib import Path

import lamella.models.titan_device  # noqa: F401  before torchtitan

# isort: split
import torch
from torchtitan.components.checkpointer.utils import canonical_fqn

from lamella.errors import UserError
from lamella.models.titan import LamellaDecoder
from lamella.models.titan_config import read_hf_config
from lamella.moe.lora import LORA_PATHS
from lamella.moe.slicing import noise_generator
from lamella.recipe import Recipe
from lamella.train.balance import fill


def add_lora(recipe: Recipe, config: LamellaDecoder.Config) -> None:
    """Give the layers of the config the recipe's deltas; UserError where the model cannot have them."""
    layers = [layer.sliced_moe for layer in config.layers if layer.sliced_moe is not None]
    if recipe.lora is not None:
        if not layers:
            raise UserError(f"lora adds to frozen experts, and {recipe.model} has none; leave it out")
        for layer in layers:
            layer.moe = layer.moe.with_lora(recipe.lora.rank, recipe.lora.alpha)
    if any(layer.moe.lora_rank for layer in layers):
        if recipe.expert_path not in LORA_PATHS:
            raise UserError(f"expert_path {recipe.expert_path} computes no LoRA; choose one of {', '.join(LORA_PATHS)}")
        if recipe.parallel.expert > 1:
            raise UserError("parallel.expert cannot share out experts with LoRA; set it to 1")


def is_new(recipe: Recipe) -> bool:
    """Whether the run begins with deltas that the model's folder does not hold."""
    moe = read_hf_config(Path(recipe.model)).moe
    return recipe.lora is not None and moe is not None and not moe.lora_rank


@torch.no_grad()
def start_lora(model: LamellaDecoder, seed: int) -> None:
    """B is zero, so the deltas are; A has variance 1 / its width, the same on any number of ranks."""
    lora = [(name, parameter) for name, parameter in model.named_parameters() if ".experts.lora_" in name]
    for name, parameter in lora:
        values = torch.zeros(parameter.shape)
        if name.endswith("_a"):
            # activation checkpointing puts a wrapper's name into the path
            generator = noise_generator(canonical_fqn(name), seed)
            values.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        fill(parameter, values)
