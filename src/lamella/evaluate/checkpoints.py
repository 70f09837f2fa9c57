"""Open what a command was given, or say in one line why not; write its report."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from pathlib import Path
from typing import TypeGuard

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lamella.architecture.embedded import EMBEDDED
from lamella.architecture.families import sizes_of
from lamella.checkpoint.embedded import embedded_model
from lamella.data.tokenizer import is_path
from lamella.errors import UserError, check_choice
from lamella.hf.adapters import adapter_blocks
from lamella.hf.models import ConvertedForCausalLM, load
from lamella.jsons import Json
from lamella.run.folder import RunDir

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def model_path(name: str | Path) -> str:
    """The folder or hub name that `name` stands for; "embedded" is the embedded dense model.

    Of a training run it is the newest checkpoint, written as a folder inside the run directory on first use.
    """
    if str(name) == EMBEDDED:
        return str(embedded_model())
    path = Path(_folder_and_adapter(name)[0]).expanduser()
    if RunDir(path).exists():
        from lamella.export.trained import materialise

        return str(materialise(path))
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(f"{path} holds no config.json; pass the folder of a model, or {EMBEDDED!r}")
    if path.is_file() or (not path.exists() and (is_path(str(name)) or "/" not in str(name))):
        raise UserError(f"no such model: {name}; pass the folder of a model, a hub name, or {EMBEDDED!r}")
    return str(path) if path.exists() else str(name)


def _folder_and_adapter(name: str | Path) -> tuple[str, str | None]:
    """("mix", "docs") of "mix@docs", one adapter of a folder that holds several as experts; else the name as it is."""
    folder, _, adapter = str(name).rpartition("@")
    return (folder, adapter) if folder and (Path(folder).expanduser() / "config.json").is_file() else (str(name), None)


def adapter_of(model: PreTrainedModel, name: str | Path) -> int | None:
    """The number of the adapter that the name asks for, "zero" for the zero expert; UserError where it is not there."""
    folder, adapter = _folder_and_adapter(name)
    if adapter is None:
        return None
    layers = adapter_blocks(model)
    known = [*layers[0].config.names, "zero"] if layers else []
    if adapter not in known:
        raise UserError(f"{folder} has no adapter {adapter!r}; it has {', '.join(known) or 'none at all'}")
    return known.index(adapter)


def open_checkpoint(name: str | Path, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """A dense or converted model, evaluating, without gradients.

    Args:
        name: see `model_path`; DIR@NAME is the model in DIR with its adapter NAME for every token.
        dtype: torch dtype or a name in DTYPES.

    Raises:
        UserError: no such model, unknown dtype or device, tensors that do not fit the config.
    """
    path = model_path(name)
    try:
        model = load(path, parse_dtype(dtype), parse_device(device))
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load the model {name}: {reason}") from error
    adapter = adapter_of(model, name)
    for layer in () if adapter is None else adapter_blocks(model):
        layer.computing.adapter = adapter
    return model.requires_grad_(False)


def without_weights(name: str | Path) -> PreTrainedModel:
    """The model as its config.json says, on the meta device: its modules and their configs, and no memory.

    Raises:
        UserError: no such model.
    """
    try:
        config = AutoConfig.from_pretrained(model_path(name))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load the model {name}: {reason}") from error


def free_device_memory() -> None:
    """Give back what models held that nothing refers to any more, cycles included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A torch dtype or "auto"; UserError for an unknown name."""
    if isinstance(dtype, str):
        check_choice("dtype", dtype, DTYPES)
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def parse_device(device: str) -> str:
    """ "auto" is the GPU where there is one; UserError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device is {device!r}; it must be auto, cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no GPU; use --device cpu")
    return device


def has_moe_layers(model: PreTrainedModel) -> TypeGuard[ConvertedForCausalLM]:
    """Whether the model has MoE layers of lamella."""
    return bool(getattr(model, "moe_layers", None))


def lower(model: PreTrainedModel, top_k: int | None, twins: float | None) -> None:
    """Let a converted model take fewer experts, or fewer twins, than it was made for.

    Raises:
        UserError: a model without experts, or with another routing than is meant.
    """
    if top_k is None and twins is None:
        return
    if not has_moe_layers(model):
        raise UserError("the model has no experts of lamella's; leave --top-k and --twins out")
    model.set_top_k(top_k)
    model.set_twin_share(twins)


def is_converted(model: PreTrainedModel) -> TypeGuard[ConvertedForCausalLM]:
    """Whether the model has MoE layers of lamella, or attention experts."""
    return has_moe_layers(model) or bool(getattr(model, "attention_experts", None))


def check_length(seq_len: int, *models: PreTrainedModel) -> None:
    """UserError for windows that are longer than a model's positions."""
    longest = min(getattr(model.config, "max_position_embeddings", seq_len) for model in models)
    if seq_len > longest:
        raise UserError(f"windows of {seq_len} tokens are longer than the model's {longest} positions; lower --seq-len")


def check_same_text_interface(dense: PreTrainedModel, moe: PreTrainedModel) -> None:
    """UserError unless both are of one shape, as a dense model and its conversion are."""
    sizes = [
        {name: getattr(model.config, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        | {"the FFN's width": ffn_width(model)}
        for model in (dense, moe)
    ]
    for name, theirs in sizes[0].items():
        if (ours := sizes[1][name]) != theirs:
            raise UserError(
                f"{name} is {ours} in the MoE and {theirs} in the dense model; compare it with the model it was made of"
            )


def ffn_width(model: PreTrainedModel) -> int:
    """F of a dense model or of the one that a conversion was made of; UserError for another family."""
    return sizes_of(model.config.to_dict()).F


def check_json_path(path: Path | None) -> None:
    """UserError now rather than after the work, if a report could not be written to `path`."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"cannot write {path}: {'it is a folder' if path.is_dir() else 'its folder does not exist'}")


def write_json(path: Path, report: Json) -> None:
    """Write a report in one piece: a temporary file beside it, then rename."""
    handle, temporary = tempfile.mkstemp(dir=path.absolute().parent, prefix=f"{path.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(report, file, indent=1)
        file.write("\n")
    os.chmod(temporary, 0o644)  # mkstemp's is for the owner alone
    os.replace(temporary, path)
