"""Adapter folders in the format of the library peft: read and checked from headers alone. Imports no torch.

`adapter_config.json` says rank and scale, `adapter_model.safetensors` holds `base_model.model.` + the module's path +
`.lora_A.weight` [r, in] and `.lora_B.weight` [out, r]. The module's output is W x + scale B A x.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
_NAME = re.compile(
    re.escape(PREFIX) + r"model\.layers\.(?P<layer>\d+)\.(?P<block>\w+)\.(?P<module>\w+)\.lora_(?P<half>[AB])\.weight"
)


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

    folder: Path
    scales: dict[Place, float]
    """The factor on B A of each place."""
    ranks: dict[Place, int]

    @property
    def weights(self) -> Path:
        """The file with its tensors."""
        return self.folder / WEIGHTS

    @staticmethod
    def tensor(place: Place, half: str) -> str:
        """The tensor's name in the file; `half` is "a" or "b"."""
        return f"{PREFIX}{place.path}.lora_{half.upper()}.weight"


def read_peft(folder: str | Path, sizes: Sizes) -> PeftAdapter:
    """The adapter of a folder, if it is one for the FFNs and the attention of a model of these sizes.

    Raises:
        UserError: no adapter; one of another kind, base or rank, or of modules that are not there or not carried; the
            message names all that is wrong with it.
    """
    folder = Path(folder).expanduser()
    config = _config(folder)
    shapes = _header(folder / WEIGHTS)
    problems = _not_carried(config)
    found: dict[Place, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        match = _NAME.fullmatch(name)
        place = None if match is None or match["module"] not in _KNOWN else Place(int(match["layer"]), match["module"])
        if match is None or place is None or not place.path.endswith(f".{match['block']}.{match['module']}"):
            problems.append(f"it changes {name.removeprefix(PREFIX)}; only {', '.join(_KNOWN)} are carried")
        else:
            found.setdefault(place, {})[match["half"]] = shape
    if not found and not problems:
        problems.append("it holds no tensor of LoRA")
    for word in config["target_modules"] if isinstance(config.get("target_modules"), list) else ():
        if not any(place.path.endswith(word) for place in found) and not problems:
            problems.append(f"it should change {word}, of which it holds no tensor")
    ranks = {place: _setting(config, "rank_pattern", place, "r") for place in found}
    for place, halves in found.items():
        problems += _misfits(place, halves, int(ranks[place]), sizes)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        base = config.get("base_model_name_or_path") or "an unknown model"
        raise UserError(f"the adapter {folder}, made for {base}, cannot be used: {'; '.join(problems[:3])}{more}")
    return PeftAdapter(
        folder, {p: _scale(config, p, r) for p, r in ranks.items()}, {p: int(r) for p, r in ranks.items()}
    )


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
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{folder / CONFIG}: lora_alpha is {config.get('lora_alpha')!r}; it must be a number")
    return config


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


def _setting(config: Json, pattern: str, place: Place, default: str) -> float:
    """A module's own rank or alpha: that of the first pattern that the end of its path fits, as in peft."""
    for words, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({words})$", place.path):
            return float(value)
    return float(config[default])


def _scale(config: Json, place: Place, rank: float) -> float:
    alpha = _setting(config, "alpha_pattern", place, "lora_alpha")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _misfits(place: Place, halves: dict[str, tuple[int, ...]], rank: int, sizes: Sizes) -> list[str]:
    width_in, width_out = widths_of(sizes)[place.block][place.module]
    if place.layer >= sizes.num_layers:
        return [f"it changes layer {place.layer}, and the model has {sizes.num_layers} layers"]
    found = []
    for half, wanted in {"A": (rank, width_in), "B": (width_out, rank)}.items():
        shape = halves.get(half)
        if shape is None:
            found.append(f"lora_{half} of {place.path} is missing")
        elif shape != wanted:
            found.append(
                f"lora_{half} of {place.path} is {list(shape)}, and the model and rank {rank} need {list(wanted)}"
            )
    return found
