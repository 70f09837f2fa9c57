"""Attention of a dense or converted checkpoint into routed experts: every tensor is copied, routers are added.

The experts are rows of q, k and v and columns of o as they stand (lamella.moe.attention.heads), so nothing is cut,
and the dense attention stays in the file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lamella.architecture.converted import (
    attention_prefix,
    converted_config,
    converted_family,
    converted_tensors,
    dense_config,
    is_converted,
)
from lamella.architecture.families import may_be_stored, sizes_of
from lamella.architecture.moe import AttentionMoEConfig
from lamella.architecture.moe_tensors import GATE_SCALE, SELECTION_BIAS, WEIGHT, is_float32, router_name, router_shapes
from lamella.checkpoint.check import check_tensors, read_config
from lamella.checkpoint.gather import Given
from lamella.checkpoint.pieces import Piece, Stretches
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import Checkpoint, card_licence, copy_sidecars, read_folder
from lamella.conversion.attention.router import RouterStartValues, start_routers
from lamella.conversion.plan import ConversionPlan, Undecided, Workspace
from lamella.errors import UserError
from lamella.recipe.methods.attention import AttentionOptions, attention_sizes


def open_dense_or_converted(model: str | Path | None) -> Checkpoint:
    """Open a dense model as `Checkpoint.open` does, or the folder of a converted one; UserError if it has attention
    experts."""
    folder = None if model is None else Path(model).expanduser()
    if folder is None or not folder.is_dir():
        return Checkpoint.open(model)
    config = read_config(folder)
    if not is_converted(config):
        return Checkpoint.open(model)
    if config.get("attention_moe") is not None:
        raise UserError(f"{model} has attention experts already; give the model that it was made of")
    tensors, dense = read_folder(folder), dense_config(config)
    check_tensors(tensors, converted_tensors(config), str(model), lambda name: may_be_stored(name, dense))
    return Checkpoint(
        str(model),
        converted_family(config),
        config,
        tensors,
        card_licence(folder),
        lambda out: copy_sidecars(folder, out),
    )


def plan_attention(model: str | Path | None, options: AttentionOptions) -> ConversionPlan:
    """The source's tensors, each layer's router behind them, and the new config.

    Raises:
        UserError: experts that do not fit the heads; when it is decided, for the router "ridge", no tokenizer or too
            little text.
    """
    source = open_dense_or_converted(model)
    config = attention_sizes(options, source.config)

    def decide(work: Workspace) -> WritePlan:
        starts = start_routers(source, config, options, work.on_progress)
        return _plan(source, config, {layer: _pieces(start, config) for layer, start in starts.items()})

    undecided: dict[int, Mapping[str, Piece]] = {layer: defaultdict(Undecided) for layer in config.layers}
    return ConversionPlan(source, _plan(source, config, undecided), decide)


def _plan(source: Checkpoint, config: AttentionMoEConfig, pieces: Mapping[int, Mapping[str, Piece]]) -> WritePlan:
    """The plan with these pieces of the routers, by layer and by their names in it."""
    tensors = [OutputTensor(t.name, t.dtype, t.shape, Stretches.copy(t)) for t in source.tensors.values()]
    shapes = router_shapes(sizes_of(source.config).D, config)
    for layer, made in pieces.items():
        prefix = attention_prefix(layer)
        dtype = source.tensors[f"{prefix}q_proj.weight"].dtype
        tensors += [
            OutputTensor(prefix + name, "F32" if is_float32(name) else dtype, shape, made[name])
            for name, shape in shapes.items()
        ]
    return WritePlan(tensors, attention_model_config(source, config))


def _pieces(start: RouterStartValues, config: AttentionMoEConfig) -> dict[str, Piece]:
    return {
        router_name(WEIGHT): Given(start.weight_ED),
        router_name(SELECTION_BIAS): Given(start.bias_E),
        router_name(GATE_SCALE): Given(torch.zeros(config.num_experts)),
    }


def attention_model_config(source: Checkpoint, config: AttentionMoEConfig) -> dict[str, Any]:
    """The source's config with the entry `attention_moe`; a dense one's type changes as in slicing."""
    if is_converted(source.config):
        return source.config | {"attention_moe": config.to_dict()}
    return converted_config(source.config, source.family, moe=None, attention_moe=config.to_dict())
