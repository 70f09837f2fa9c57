"""The weights of a training run as a transformers folder, read by one process without a process group."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lamella.architecture.converted import ENTRIES, converted_tensors, ffn_config
from lamella.architecture.moe import MoEConfig
from lamella.architecture.moe_tensors import is_expert, is_float32
from lamella.architecture.names import hf_name
from lamella.checkpoint.check import read_config
from lamella.checkpoint.distributed import checkpoint_reader
from lamella.checkpoint.manifest import changed_tensors
from lamella.checkpoint.source import read_folder
from lamella.checkpoint.tensors import SourceTensor
from lamella.checkpoint.tying import as_stored
from lamella.errors import UserError
from lamella.recipe.sections import LoRA
from lamella.run.folder import RunDir
from lamella.run.store import CheckpointStore

MAX_SHARD_BYTES = 5_000_000_000
# What torchtitan saves beside the model, by the prefix of its names.
OTHER_STATE = ("optimizer.", "lr_scheduler.", "dataloader.", "train_state.")


def materialise(run_dir: str | Path, step: int | None = None, dtype: torch.dtype | None = None) -> Path:
    """The HF-format lamella folder of a checkpoint, `run_dir/hf/step-N/` (`step-N-DTYPE/`); written once.

    Args:
        step: of the checkpoint; None takes the newest.
        dtype: of the weights; None takes the model's own, in which frozen tensors have the bytes they had before
            training. The selection bias stays float32.

    Raises:
        UserError: no run directory, no checkpoint, none of this step, or a damaged one.
    """
    run = RunDir(Path(run_dir))
    step = _checkpoint_step(run, step)
    folder = run.hf(step)
    if dtype is not None and dtype != model_dtype(run.model):
        folder = folder.with_name(f"{folder.name}-{str(dtype).removeprefix('torch.')}")
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        _check_whole(run.store(), step)
        _write_weights(run, step, temporary, dtype or model_dtype(run.model))
        for file in run.model.iterdir():
            if file.is_dir():
                shutil.copytree(file, temporary / file.name, copy_function=shutil.copyfile)
            elif file.name != "fingerprint.json":
                shutil.copyfile(file, temporary / file.name)
        if lora := run.recipe().lora:
            _describe_lora(temporary / "config.json", lora)
        _date(temporary, run.store().manifest(step)["time"])
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _describe_lora(config_json: Path, lora: LoRA) -> None:
    """The run's model folder is of the model as it was before the run, which may have had no deltas."""
    config = json.loads(config_json.read_text())
    config["moe"] |= {"lora_rank": lora.rank, "lora_alpha": lora.alpha}
    config_json.write_text(json.dumps(config, indent=2) + "\n")


def _date(folder: Path, time_s: float) -> None:
    """The weights get the checkpoint's time: made again, the folder still counts as the same model for later runs."""
    for file in folder.glob("*.safetensors"):
        os.utime(file, (time_s, time_s))


def model_dtype(folder: Path) -> torch.dtype:
    """The dtype named in config.json; float32 where none is."""
    config = json.loads((folder / "config.json").read_text())
    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."))


def _checkpoint_step(run: RunDir, step: int | None) -> int:
    if not run.exists():
        raise UserError(f"{run.path} is no run directory: it holds no config.yaml")
    steps = run.steps()
    if not steps:
        raise UserError(f"{run.path} has no checkpoint yet; train until step {run.recipe().save_every_steps}")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise UserError(f"{run.path} has no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    return step


def _check_whole(store: CheckpointStore, step: int) -> None:
    """UserError where a byte is not as it was written: reading a damaged checkpoint would go unnoticed."""
    if problems := list(store.problems(step)):
        whole = next((s for s in reversed(store.steps()) if s < step and not any(store.problems(s))), None)
        advice = "no older one is whole" if whole is None else f"the newest whole one before it is step {whole}"
        raise UserError(f"{store.path(step)} is damaged: {problems[0]}; {advice}")


class _Trained(NamedTuple):
    """A tensor in a distributed checkpoint."""

    name: str
    """As training has it."""
    size: torch.Size
    dtype: torch.dtype
    shape: tuple[int, ...]
    """In a model's file, where packed experts have three dimensions."""


def _write_weights(run: RunDir, step: int, out: Path, dtype: torch.dtype) -> None:
    """Shards of at most 5 GB, one in memory at a time: what was trained, and from the model what was not."""
    checkpoint = run.store().path(step)
    entries = checkpoint_reader(checkpoint).read_metadata().state_dict_metadata
    moe = ffn_config(read_config(run.model))
    tensors: dict[str, _Trained | SourceTensor] = {
        hf_name(name): _Trained(name, entry.size, entry.properties.dtype, _shape_in_file(name, entry.size, moe))
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith(OTHER_STATE)
    }
    tensors |= _still_in_model(run, tensors)
    shards = _shards({name: math.prod(tensor.shape) for name, tensor in tensors.items()}, dtype)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file, shard in zip(names, shards, strict=True):
        values = _read(checkpoint, {name: tensors[name] for name in shard})
        hf = {name: _cast(name, tensor, dtype) for name, tensor in values.items()}
        save_file(hf, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(hf, file)
        total_bytes += sum(t.nbytes for t in hf.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _shape_in_file(name: str, size: torch.Size, moe: MoEConfig | None) -> tuple[int, ...]:
    """The shape of a tensor, by training's name, where training makes packed experts one matrix."""
    if moe is None or not is_expert(name) or len(size) != 2:
        return tuple(size)
    own = moe.for_layer(int(name.split(".")[1]))
    E = own.num_trainable_experts if ".trainable_" in name else own.num_frozen_experts
    return (E, size[0] // E, size[1])


def _still_in_model(run: RunDir, trained: Container[str]) -> dict[str, SourceTensor]:
    """Those tensors of the model that its checkpoints leave out, since training does not change them."""
    config = read_config(run.model)
    if all(config.get(entry) is None for entry in ENTRIES):
        return {}  # a dense model is trained whole
    missing = [name for name in converted_tensors(config) if name not in trained]
    if not missing:
        return {}
    folder = run.model_folder()
    found = read_folder(folder)
    # the file decides whether the head is the embedding: a config that ties another one would lose it here
    missing = [name for name in converted_tensors(as_stored(config, found, str(folder))) if name not in trained]
    if changed := sorted(set(changed_tensors(folder)).intersection(missing)):
        raise UserError(f"{folder}: {changed[0]} is not what the conversion wrote; put an undamaged copy of it there")
    return {name: found[name] for name in missing}


def _read(checkpoint: str, tensors: dict[str, _Trained | SourceTensor]) -> dict[str, torch.Tensor]:
    """The values, by the names of transformers, in the given order."""
    trained = {t.name: torch.empty(t.size, dtype=t.dtype) for t in tensors.values() if isinstance(t, _Trained)}
    if trained:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(trained, storage_reader=checkpoint_reader(checkpoint), no_dist=True)
    return {
        name: trained[t.name].view(t.shape) if isinstance(t, _Trained) else t.read(0, t.numel).view(t.shape)
        for name, t in tensors.items()
    }


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if is_float32(name) else tensor.to(dtype)


def _shards(numel: dict[str, int], dtype: torch.dtype) -> list[list[str]]:
    """Names of the tensors of each file, given the numbers in each tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, count in numel.items():
        num_bytes = count * dtype.itemsize
        if shards[-1] and size + num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards
