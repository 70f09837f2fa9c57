"""Lay the recipe's `torchtitan:` mapping over torchtitan's config dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import typing
from typing import TYPE_CHECKING, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from lamella.jsons import Json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

from lamella.errors import UserError, did_you_mean

# What a recipe key already says; two places for one setting would contradict each other.
OWNED = {
    "training.steps": "steps",
    "training.seq_len": "seq_len",
    "training.local_batch_size": "samples_per_micro_batch",
    "training.global_batch_size": "samples_per_step",
    "training.max_norm": "max_grad_norm",
    "training.enable_cpu_offload": "offload",
    "training.mixed_precision_param": "precision",
    "dump_folder": "out",
    "hf_assets_path": "model",
    "debug.seed": "seed",
    "lr_scheduler": "warmup_steps, decay, decay_ratio and min_lr_ratio",
    "checkpoint.enable": "save_every_steps",
    "checkpoint.interval": "save_every_steps",
    "checkpoint.keep_latest_k": "keep_checkpoints",
    "checkpoint.initial_load_path": "model",
    "checkpoint.folder": "checkpoint_folder",
    "checkpoint.async_mode": "checkpoint_async",
    "metrics.log_freq": "log_every_steps",
    "metrics.enable_tensorboard": "tensorboard",
    "dataloader": "data",
    "validator": "heldout_every_steps",
    "model_spec": "model",
    "parallelism.data_parallel_replicate_degree": "parallel.replicate",
    "parallelism.data_parallel_shard_degree": "parallel",
    "parallelism.expert_parallel_degree": "parallel.expert",
    "parallelism.context_parallel_degree": "parallel.context",
    "parallelism.tensor_parallel_degree": "parallel.tensor",
    "parallelism.enable_sequence_parallel": "parallel.tensor",
    "parallelism.pipeline_parallel_degree": "parallel.pipeline",
    "parallelism.pipeline_parallel_microbatch_size": "samples_per_micro_batch",
    "recipe": "the other keys of the recipe",
}
# Known not to work with this model yet.
REFUSED = {
    "parallelism.pipeline_parallel_schedule": ("1F1B", "GPipe"),
    "parallelism.spmd_backend": ("partial_dtensor",),
    "compile.enable": (False,),
}

Config = TypeVar("Config", bound="DataclassInstance")


def overlay(config: Config, values: Json) -> Config:
    """A copy of the dataclass tree with nested `values` laid over it.

    Raises:
        UserError: all unknown keys, wrong types, and keys that a recipe setting owns, at once.
    """
    problems: list[str] = []
    result = _overlay(config, values, "", problems)
    if problems:
        raise UserError("the recipe's torchtitan section has errors:\n" + "\n".join(f"  {p}" for p in problems))
    return result


def _overlay(config: Config, values: Json, prefix: str, problems: list[str]) -> Config:
    fields = {f.name: f for f in dataclasses.fields(config) if not f.name.startswith("_")}
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in fields:
            problems.append(f"unknown key {path!r}{did_you_mean(str(key), fields)}")
        elif path in OWNED:
            problems.append(f"{path} is set by the recipe: use {OWNED[path]}")
        elif path in REFUSED and value not in REFUSED[path]:
            problems.append(f"{path}={value!r} does not work with this model; it must be {REFUSED[path][0]!r}")
        else:
            changes[key] = _field(getattr(config, key), hints[key], value, path, problems)
    if problems:
        return config
    try:
        return dataclasses.replace(config, **changes)
    except (ValueError, AssertionError) as error:
        problems.append(f"{prefix.rstrip('.') or 'torchtitan'}: {error}")
        return config


def _field(current: object, hint: type, value: object, path: str, problems: list[str]) -> object:
    if dataclasses.is_dataclass(current) and not isinstance(current, type) and isinstance(value, dict):
        return _overlay(current, value, f"{path}.", problems)
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        problems.append(f"{path}: {error.errors()[0]['msg']}, not {value!r}")
        return current
