"""Lay the recipe's `torchtitan:` mapping over torchtitan's config dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torchtitan.config import ParallelismConfig

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
    "loss": "objective",
    "tokenizer": "model",
    "compile.enable": "compile",
    "optimizer.param_groups": "lr, router_lr_scale, weight_decay and their like",
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
    "heldout": "heldout_data",
    "teacher": "distil.teacher",
    "notes": "the other keys of the recipe",
    "stream": "the other keys of the recipe",
    "stop": "the other keys of the recipe",
    "heart": "the other keys of the recipe",
}
Config = TypeVar("Config", bound="DataclassInstance")

# Path -> (the only value that is taken, why another one would do nothing here, or harm).
REFUSED: dict[str, tuple[object, str]] = {
    "training.disable_cuda_graphs": (True, "some expert paths wait for the host"),
    "training.dtype": ("float32", "weights are trained in float32; `precision` says how they are computed"),
    "parallelism.enable_fsdp_symm_mem": (False, "FSDP's collectives do not use symmetric memory"),
    "parallelism.spmd_backend": ("partial_dtensor", "the experts are plain tensors"),
    "parallelism.pipeline_parallel_schedule_csv": ("", "a schedule has a name"),
    "parallelism.context_parallel_load_balancer": ("headtail", "tokens are shared out from both ends"),
    "parallelism.context_parallel_ptrr_mask_key": (None, "tokens are shared out from both ends"),
    "metrics.disable_color_printing": (True, "torchtitan's lines go to a log file"),
    "metrics.save_tb_folder": ("tensorboard", "a run directory has fixed names"),
    "metrics.save_for_all_ranks": (False, "metrics are those of all ranks together"),
    "checkpoint.initial_load_model_only": (True, "a run begins with a model"),
    "checkpoint.initial_load_in_hf": (True, "a run begins with a model in transformers' layout"),
    "checkpoint.initial_load_in_hf_quantized": (False, "quantised weights cannot be trained"),
    "checkpoint.last_save_model_only": (False, "the last checkpoint could not be resumed"),
    "checkpoint.last_save_in_hf": (False, "a run's model is written by `lamella export`"),
    "checkpoint.export_dtype": ("float32", "a run's model is written by `lamella export`"),
    "checkpoint.exclude_from_loading": ([], "a run is resumed whole"),
    "checkpoint.create_seed_checkpoint": (False, "weights come from the model"),
    "checkpoint.load_only": (False, "a run could not be resumed"),
    "compile.enable_async_tensor_parallel": (False, "blocks under tensor parallelism are not compiled"),
    "comm.mode": ("default", "the ranks are real"),
    "debug.spmd_typechecking": (False, "the experts are plain tensors"),
    "debug.moe_force_load_balance": (False, "it is for torchtitan's own MoE; see `balancing`"),
    "debug.batch_invariant": (False, "it is for inference"),
    "override.imports": ([], "modules of a run come from its model"),
}
# Values of a text that are taken.
SCHEDULES = ("1F1B", "GPipe")
# Options of torchtitan that this config does not reach: words that somebody may look for.
UNREACHABLE = {
    "memory_budget": "set activation_checkpointing: selective or full",
    "float8": "set dense_products: float8",
    "mxfp8": "products are computed in `precision`",
    "mx": "products are computed in `precision`",
    "nvfp4": "products are computed in `precision`",
    "quantization": "products are computed in `precision`",
    "converters": "products are computed in `precision`",
}
# These do what torchtitan says of them. A section stands for all that is in it.
WORKS = frozenset({
    "profiler", "metrics.enable_wandb", "optimizer.implementation", "optimizer.optimizer_factory_kwargs_by_name",
    "training.mixed_precision_reduce", "training.gc_freq", "training.gc_debug",
    "parallelism.fsdp_reshard_after_forward", "parallelism.pipeline_parallel_schedule",
    "parallelism.module_fqns_per_model_part", "parallelism.pipeline_parallel_first_stage_less_layers",
    "parallelism.pipeline_parallel_last_stage_less_layers", "parallelism.pipeline_parallel_layers_per_stage",
    "checkpoint.load_step", "checkpoint.enable_first_step_checkpoint",
    "activation_checkpoint", "compile.backend", "compile.components",
    "comm.init_timeout_seconds", "comm.train_timeout_seconds", "comm.trace_buf_size", "comm.save_traces_folder",
    "comm.save_traces_file_prefix",
    "debug.deterministic", "debug.deterministic_warn_only", "debug.detect_anomaly", "debug.print_config",
    "debug.save_config_file", "debug.enable_structured_logging",
})  # fmt: skip


def _is_in(path: str, table: Iterable[str]) -> bool:
    """Whether the table has the path, or a section that it is in."""
    return any(path == entry or path.startswith(f"{entry}.") for entry in table)


def is_known(path: str) -> bool:
    """Whether it is said what becomes of a torchtitan option."""
    return path in REFUSED or _is_in(path, OWNED) or _is_in(path, WORKS)


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
        if key in UNREACHABLE and key not in fields:
            problems.append(f"{path} cannot be set: {UNREACHABLE[key]}")
        elif key not in fields:
            problems.append(f"unknown key {path!r}{did_you_mean(str(key), fields)}")
        elif path in OWNED:
            problems.append(f"{path} is set by the recipe: use {OWNED[path]}")
        elif refusal := _refusal(config, path, value):
            problems.append(refusal)
        else:
            changes[key] = _field(getattr(config, key), hints[key], value, path, problems)
    if problems:
        return config
    try:
        return dataclasses.replace(config, **changes)
    except (ValueError, AssertionError) as error:
        problems.append(f"{prefix.rstrip('.') or 'torchtitan'}: {error}")
        return config


def _refusal(config: object, path: str, value: object) -> str | None:
    """Why this value of an option is not taken, if so."""
    if path in REFUSED and value != REFUSED[path][0]:
        only, why = REFUSED[path]
        return f"{path}={value!r} has no use here: {why}; it must be {only!r}"
    name = path.rpartition(".")[2]
    if isinstance(config, ParallelismConfig) and _is_for_pipelines(name):
        if config.pipeline_parallel_degree == 1:
            return f"{path} is for pipelines; set parallel.pipeline, too"
        if name == "pipeline_parallel_schedule" and value not in SCHEDULES:
            return f"{path}={value!r} does not work with this model; it must be one of {', '.join(SCHEDULES)}"
    if path == "activation_checkpoint" and getattr(config, name) is None:
        budget = (
            "; memory_budget: " + UNREACHABLE["memory_budget"]
            if isinstance(value, dict) and "memory_budget" in value
            else ""
        )
        return f"{path} is off; set activation_checkpointing: selective or full, too{budget}"
    return None if is_known(path) or dataclasses.is_dataclass(getattr(config, name)) else f"{path}: not known"


def _is_for_pipelines(name: str) -> bool:
    return name.startswith("pipeline_parallel_") or name == "module_fqns_per_model_part"


def _field(current: object, hint: type, value: object, path: str, problems: list[str]) -> object:
    if dataclasses.is_dataclass(current) and not isinstance(current, type) and isinstance(value, dict):
        return _overlay(current, value, f"{path}.", problems)
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        problems.append(f"{path}: {error.errors()[0]['msg']}, not {value!r}")
        return current
