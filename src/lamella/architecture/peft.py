"""Adapter folders in the format of the library peft: read and checked from headers alone. Imports no torch.

`adapter_config.json` says rank and scale, `adapter_model.safetensors` holds `base_model.model.` + the module's path +
`.lora_A.weight` [r, in] and `.lora_B.weight` [out, r] (LoRA, arXiv 2106.09685). The module's output is
W x + scale B A x; scale is lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lamella.architecture.adapters import IN_HF, MODULES, Block, block_of, widths_of
from lamella.architecture.model import Sizes
from lamella.errors import UserError
from lamella.jsons import Json, json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What changes the function of an adapter and is not carried, with what peft says where it is off.
NOT_CARRIED = {
    "use_dora": "DoRA", "lora_bias": "a bias on LoRA", "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save", "layer_replication": "layer_replication", "use_qalora": "QA-LoRA",
    "trainable_token_indices": "trainable_token_indices", "alora_invocation_tokens": "activated LoRA",
    "fan_in_fan_out": "fan_in_fan_out", "arrow_config": "Arrow", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "velora_config": "VeLoRA",
}  # fmt: skip
_KNOWN = tuple(module for modules in MODULES.values() for module in modules)
_NAME = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<half>[AB])(\.default)?\.weight")
_PLACE = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<block>\w+)\.(?P<module>\w+)")


class Half(NamedTuple):
    """One of the two low-rank matrices of a module."""

    tensor: str
    """Its name in the file."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Lora:
    """What a folder says of an adapter, whatever its modules are."""

    folder: Path
    config: Json
    halves: dict[str, dict[str, Half]]
    """The module's path -> "A" [r, in] and "B" [out, r]."""
    problems: list[str]
    """What it is, or has, that is not carried."""

    @property
    def weights(self) -> Path:
        """The file with its tensors."""
        return self.folder / WEIGHTS

    def rank(self, module: str) -> int:
        """The module's own, or that of the adapter."""
        return int(_setting(self.config, "rank_pattern", module, "r"))

    def scale(self, module: str) -> float:
        """The factor on B A."""
        alpha, rank = _setting(self.config, "alpha_pattern", module, "lora_alpha"), self.rank(module)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def refused(self, problems: list[str]) -> UserError:
        """The error that says so."""
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        base = self.config.get("base_model_name_or_path") or "an unknown model"
        return UserError(f"the adapter {self.folder}, made for {base}, cannot be used: {'; '.join(problems[:3])}{more}")


def read_lora(folder: str | Path) -> Lora:
    """The adapter of a folder; UserError where there is none."""
    folder = Path(folder).expanduser()
    config = _config(folder)
    problems = _not_carried(config)
    halves: dict[str, dict[str, Half]] = {}
    for name, shape in ({} if problems else _header(folder / WEIGHTS)).items():
        if match := _NAME.fullmatch(name):
            halves.setdefault(match["module"], {})[match["half"]] = Half(name, shape)
        else:
            problems.append(f"it changes {name.removeprefix(PREFIX)}, which is no LoRA of a linear layer")
    if not halves and not problems:
        problems.append("it holds no tensor of LoRA")
    return Lora(folder, config, halves, problems)


class Place(NamedTuple):
    """The module that low-rank matrices belong to."""

    layer: int
    module: str
    """Such as "gate_proj"."""

    @property
    def path(self) -> str:
        """As peft and transformers call it."""
        return IN_HF[self.block].format(self.layer) + self.module

    @property
    def block(self) -> Block:
        """What it is a part of."""
        return block_of(self.module)


@dataclass(frozen=True)
class PeftAdapter:
    """A checked adapter of FFNs, attention or both."""

    lora: Lora
    scales: dict[Place, float]
    """The factor on B A of each place."""
    ranks: dict[Place, int]

    @property
    def folder(self) -> Path:
        return self.lora.folder

    @property
    def weights(self) -> Path:
        """The file with its tensors."""
        return self.lora.weights

    def stored(self, place: Place, half: str) -> str:
        """The tensor's name in the file; `half` is "a" or "b"."""
        return self.lora.halves[place.path][half.upper()].tensor


def read_peft(folder: str | Path, sizes: Sizes) -> PeftAdapter:
    """The adapter of a folder, if it is one for the FFNs and the attention of a model of these sizes.

    Raises:
        UserError: no adapter; one of another kind, base or rank, or of modules that are not there or not carried; the
            message names all that is wrong with it.
    """
    lora = read_lora(folder)
    problems, found = list(lora.problems), {}
    for module in lora.halves:
        match = _PLACE.fullmatch(module)
        place = None if match is None or match["module"] not in _KNOWN else Place(int(match["layer"]), match["module"])
        if place is None or place.path != module:
            problems.append(f"it changes {module}; only {', '.join(_KNOWN)} are carried")
        else:
            found[place] = lora.halves[module]
    words = lora.config.get("target_modules")
    for word in words if isinstance(words, list) else ():
        if not any(place.path.endswith(word) for place in found) and not problems:
            problems.append(f"it should change {word}, of which it holds no tensor")
    for place, halves in found.items():
        problems += _misfits(place, halves, lora.rank(place.path), sizes)
    if problems:
        raise lora.refused(problems)
    return PeftAdapter(lora, {p: lora.scale(p.path) for p in found}, {p: lora.rank(p.path) for p in found})


def tensor_name(place: Place, half: str) -> str:
    """A tensor's name as peft saves it; `half` is "a" or "b"."""
    return f"{PREFIX}{place.path}.lora_{half.upper()}.weight"


def lora_config(base_name: str, rank: int, alpha: float, layers: Sequence[int], blocks: Sequence[Block]) -> Json:
    """adapter_config.json of an adapter of all modules of these blocks in these layers."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [module for block in blocks for module in MODULES[block]],
        "layers_to_transform": list(layers), "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "inference_mode": True,
    }  # fmt: skip


def _config(folder: Path) -> Json:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no adapter: it holds no {CONFIG}; give a folder that peft has saved")
    config = json_object((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise UserError(f"{folder / CONFIG}: r is {config.get('r')!r}; it must be a whole number from 1 on")
    if not _is_finite(config.get("lora_alpha")):
        raise UserError(f"{folder / CONFIG}: lora_alpha is {config.get('lora_alpha')!r}; it must be a number")
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            is_right = all(re.compile(words) and _is_finite(own) for words, own in (config.get(key) or {}).items())
        except (AttributeError, re.error):
            is_right = False
        if not is_right:
            raise UserError(f"{folder / CONFIG}: {key} is {config[key]!r}; it must give a number for names of modules")
    return config


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _not_carried(config: Json) -> list[str]:
    found = [f"it uses {what}, which is not carried" for key, what in NOT_CARRIED.items() if config.get(key)]
    if config.get("peft_type") != "LORA":
        found.append(f"its peft_type is {config.get('peft_type')!r}, and only LORA is carried")
    if config.get("bias") not in (None, "none"):
        found.append(f"it trained biases (bias {config['bias']!r}), which are not carried")
    return found


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file."""
    if not file.is_file():
        raise UserError(f"there is no {file}; an adapter's weights must be in safetensors")
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, file.stat().st_size)))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is no safetensors file ({error}); bring the original back") from None


def _setting(config: Json, pattern: str, module: str, default: str) -> float:
    """A module's own rank or alpha: that of the first pattern that the end of its path fits, as in peft."""
    for words, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({words})$", module):
            return float(value)
    return float(config[default])


def _misfits(place: Place, halves: dict[str, Half], rank: int, sizes: Sizes) -> list[str]:
    width_in, width_out = widths_of(sizes)[place.block][place.module]
    if place.layer >= sizes.num_layers:
        return [f"it changes layer {place.layer}, and the model has {sizes.num_layers} layers"]
    found = []
    for half, wanted in {"A": (rank, width_in), "B": (width_out, rank)}.items():
        if half not in halves:
            found.append(f"lora_{half} of {place.path} is missing")
        elif (shape := halves[half].shape) != wanted:
            found.append(
                f"lora_{half} of {place.path} is {list(shape)}, and the model and rank {rank} need {list(wanted)}"
            )
    return found
