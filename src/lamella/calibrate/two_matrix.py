"""GPT-2 and OPT folders, whose FFN has two matrices, opened as checkpoints that can be calibrated."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lamella.calibrate.anatomy import anatomy_of
from lamella.convert.checkpoint import Checkpoint, card_licence, check_tensors, copy_sidecars, read_config, read_folder
from lamella.convert.families import Family, Shapes
from lamella.convert.tensors import SourceTensor
from lamella.errors import UserError

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "opt": "OPTForCausalLM"}


def open_two_matrix(folder: Path) -> Checkpoint:
    """A folder with config.json and safetensors of GPT-2 or OPT.

    Raises:
        UserError: another family, OPT's post-norm variant, or tensors that do not match the config.
    """
    config = read_config(folder)
    architecture = ARCHITECTURES.get(str(config.get("model_type")))
    if architecture is None:
        raise UserError(f"{folder} is {config.get('model_type')!r}; this opens {', '.join(ARCHITECTURES)} alone")
    anatomy_of(config)
    expected, prefix = _expected(config)
    # Some files of GPT-2 name their tensors from inside the decoder, and hold its masks, which nobody reads today.
    found = read_folder(folder)
    tensors = {name: _renamed(tensor, name) for key, tensor in found.items() if (name := _full(key, expected, prefix))}
    check_tensors(tensors, expected, str(folder), lambda name: name == "lm_head.weight")
    return Checkpoint(
        str(folder), Family(config["model_type"], architecture), config, tensors, card_licence(folder),
        lambda out: copy_sidecars(folder, out),
    )  # fmt: skip


def _expected(config: dict[str, Any]) -> tuple[Shapes, str]:
    """(the tensors' shapes, the prefix of the names in the decoder)."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config["model_type"]].from_dict(config))
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}, f"{model.base_model_prefix}."


def _full(name: str, expected: Shapes, prefix: str) -> str | None:
    """The parameter's whole name; None for a mask of GPT-2's attention."""
    if name.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return prefix + name if prefix + name in expected else name


def _renamed(tensor: SourceTensor, name: str) -> SourceTensor:
    return dataclasses.replace(tensor, name=name)
