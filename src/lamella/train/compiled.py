"""Whether the blocks of a run's model are compiled, and why not."""

from __future__ import annotations

from torchtitan.tools.logging import logger

from lamella.errors import UserError
from lamella.recipe.training import Recipe
from lamella.titan.compile import COMPILED_PATHS
from lamella.titan.decoder import LamellaDecoder


def compiles(recipe: Recipe, model: LamellaDecoder.Config, on_gpu: bool) -> bool:
    """Whether the model's blocks are compiled; UserError where the recipe wants it and it cannot be."""
    wanted = on_gpu if recipe.compile == "auto" else recipe.compile
    reason = why_eager(recipe, model, on_gpu)
    if not wanted:
        return False
    if reason is not None and recipe.compile is True:
        raise UserError(f"compile: on cannot be had: {reason}; or set compile: off")
    if reason is not None:
        logger.info(f"Blocks are not compiled: {reason}")
    return reason is None


def why_eager(recipe: Recipe, config: LamellaDecoder.Config, on_gpu: bool) -> str | None:
    """Why the blocks of this model cannot be compiled here; None where they can."""
    moes = [layer.moe_layer.moe for layer in config.layers if layer.moe_layer is not None]
    path, parallel = recipe.expert_path, recipe.parallel
    if moes and path not in COMPILED_PATHS and not (path == "auto" and on_gpu):
        named = "that auto takes on a CPU" if path == "auto" else path
        why = "was not tried in a graph" if path == "quack" else "waits for the host in each layer"
        return f"the expert path {named} {why}; set expert_path: grouped"
    if moes and not on_gpu and recipe.precision != "bfloat16":
        return "grouped products have no compiled form in float32 on a CPU; set precision: bfloat16"
    if parallel.expert > 1 and any(moe.routing == "flat" for moe in moes):
        return "a rank's share of flat routing's rows is asked from the device in each layer; set parallel.expert: 1"
    if parallel.tensor > 1:
        return "layers under tensor parallelism exchange tokens in ways that were not tried compiled"
    if recipe.top_k_schedule is not None:
        return "each number of experts in top_k_schedule would be compiled anew"
    return None
