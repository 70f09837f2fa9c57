"""Attention of a dense or converted checkpoint into routed experts: every tensor is copied, routers are added.

The experts are rows of q, k and v and columns of o as they stand (lamella.moe.attention.heads), so nothing is cut,
and the dense attention stays in the file.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from lamella.architecture.converted import (
    attention_prefix,
    converted_config,
    converted_family,
    converted_tensors,
    dense_config,
)
from lamella.architecture.families import CONVERTED_PREFIX, may_be_stored
from lamella.architecture.moe import AttentionMoEConfig
from lamella.checkpoint.gather import Given
from lamella.checkpoint.pieces import Stretches
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import (
    Checkpoint,
    card_licence,
    check_tensors,
    copy_sidecars,
    read_config,
    read_folder,
)
from lamella.conversion.attention.router import start_routers
from lamella.conversion.work import Work
from lamella.errors import UserError
from lamella.recipe.methods.attention import AttentionOptions, attention_config


def open_dense_or_converted(model: str | Path | None) -> Checkpoint:
    """As `Checkpoint.open`, and the folder of a converted model as well; UserError if it has attention experts."""
    folder = None if model is None else Path(model).expanduser()
    if folder is None or not folder.is_dir():
        return Checkpoint.open(model)
    config = read_config(folder)
    if not str(config.get("model_type")).startswith(CONVERTED_PREFIX):
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


def plan_attention(source: Checkpoint, options: AttentionOptions, work: Work) -> WritePlan:
    """The source's tensors, each layer's router behind them, and the new config.

    Raises:
        UserError: experts that do not fit the heads; for the router "ridge" no tokenizer or too little text.
    """
    config = attention_config(source.config, source.family, options)
    sizes_only = work.folder is None
    chosen = dataclasses.replace(options, router="zero", balance=None) if sizes_only else options
    tensors = [OutputTensor(t.name, t.dtype, t.shape, Stretches.copy(t)) for t in source.tensors.values()]
    for layer, start in start_routers(source, config, chosen, work.on_progress).items():
        prefix = f"{attention_prefix(layer)}router."
        own = {"weight": start.weight_ED, "selection_bias": start.bias_E}
        if config.gate == "unit":
            own["gate_scale"] = torch.zeros(config.num_experts)
        dtype = source.tensors[f"{attention_prefix(layer)}q_proj.weight"].dtype
        tensors += [
            OutputTensor(prefix + name, "F32" if name == "selection_bias" else dtype, tuple(value.shape), Given(value))
            for name, value in own.items()
        ]
    return WritePlan(tensors, attention_model_config(source, config))


def attention_model_config(source: Checkpoint, config: AttentionMoEConfig) -> dict[str, Any]:
    """The source's config with the entry `attention_moe`; a dense one's type changes as in slicing."""
    if source.config["model_type"] != source.family.name:
        return source.config | {"attention_moe": config.to_dict()}
    return converted_config(source.config, source.family, moe=None, attention_moe=config.to_dict())
