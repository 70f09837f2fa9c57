"""A peft adapter (LoRA, arXiv 2106.09685) merged into a model where its tensors are read: W + scale * B A.

Nothing is written in between. scale is lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA (rsLoRA).

Shapes: O outputs, I inputs, r rank.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.checkpoint.check import listed, read_json
from lamella.checkpoint.source import Checkpoint
from lamella.checkpoint.tensors import SourceTensor, read_header
from lamella.errors import UserError
from lamella.jsons import Json

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# Settings that change what an adapter computes, beside rank and alpha: none of these is held.
_NOT_HELD = (
    "use_dora", "modules_to_save", "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices",
    "use_qalora", "target_parameters", "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip


@dataclass(frozen=True)
class MergedTensor(SourceTensor):
    """A weight that reads as W + scale * B A, computed in float32 and rounded to W's dtype."""

    weight: SourceTensor
    a: SourceTensor
    """[r, I]"""
    b: SourceTensor
    """[O, r]"""
    scale: float

    def read(self, start: int, count: int) -> Tensor:
        """As SourceTensor.read; whole rows are computed, and no others."""
        width, rank = self.shape[1], self.a.shape[0]
        first, last = start // width, -(-(start + count) // width)
        data = self.weight.read(first * width, (last - first) * width)
        a_rI = self.a.read(0, self.a.numel).view(rank, width).float()
        b_Or = self.b.read(first * rank, (last - first) * rank).view(-1, rank).float()
        merged = data.float() + ((b_Or @ a_rI) * self.scale).flatten()
        return merged.to(data.dtype)[start - first * width :][:count]


def with_adapter(source: Checkpoint, adapter: str, revision: str | None) -> dict[str, SourceTensor]:
    """The tensors of a model with a peft adapter merged in.

    Raises:
        UserError: no such adapter; one that is no LoRA, has what is not held (DoRA, biases, ...), or does not fit.
    """
    folder = adapter_folder(adapter, revision)
    config = read_json(folder / CONFIG, f"{adapter} has no {CONFIG}; give the folder of a peft adapter")
    _check(config, adapter)
    pairs: dict[str, dict[str, SourceTensor]] = {}
    unknown = []
    for name, tensor in _tensors(folder, adapter).items():
        if match := _NAME.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["part"]] = tensor
        else:
            unknown.append(name)
    if unknown or not pairs:
        what = listed(unknown) if unknown else "nothing"
        raise UserError(f"the adapter {adapter} holds {what}; only LoRA of linear layers can be merged")
    merged = dict(source.tensors)
    for module, pair in pairs.items():
        name = f"{module}.weight"
        if set(pair) != {"A", "B"}:
            raise UserError(f"the adapter {adapter} has half of a LoRA for {module}; train or download it again")
        if name not in merged:
            raise UserError(f"the adapter {adapter} is for {module}, which {source.name} has not: of another base")
        merged[name] = _merged(merged[name], pair["A"], pair["B"], _scale(config, module), adapter, source.name)
    return merged


def adapter_folder(adapter: str, revision: str | None) -> Path:
    """The adapter's folder on this disk, downloaded if it is a hub name."""
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w\-.]+/[\w\-.]+", adapter) or adapter.startswith("."):
        raise UserError(f"no such adapter: {adapter} is no folder here, and cannot be a hub name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(adapter, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"no such adapter: {adapter} is no folder here, and the hub did not give it ({reason})"
        ) from None


def _check(config: Json, adapter: str) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"the adapter {adapter} is {config.get('peft_type')!r}; only LORA can be merged")
    wrong = [key for key in _NOT_HELD if config.get(key)]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias {config['bias']!r}")
    if wrong:
        raise UserError(f"the adapter {adapter} has {', '.join(wrong)}, which is not merged here; merge it with peft")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{key} of the adapter {adapter} is {value!r}; it must be a positive number")


def _tensors(folder: Path, adapter: str) -> dict[str, SourceTensor]:
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{adapter} has no {WEIGHTS}; save the adapter as safetensors")
    return read_header(folder / WEIGHTS)


def _scale(config: Json, module: str) -> float:
    rank = _pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, float] | None, module: str, default: float) -> float:
    """A module's own value: peft matches the ends of names."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _merged(
    weight: SourceTensor, a: SourceTensor, b: SourceTensor, scale: float, adapter: str, model: str
) -> MergedTensor:
    fits = len(a.shape) == len(b.shape) == len(weight.shape) == 2 and a.shape[0] == b.shape[1]
    if not fits or (b.shape[0], a.shape[1]) != weight.shape:
        raise UserError(
            f"the adapter {adapter} changes {weight.name} by {list(b.shape)} x {list(a.shape)}, but in {model} it is "
            f"{list(weight.shape)}: an adapter of another base"
        )
    return MergedTensor(weight.name, weight.dtype, weight.shape, weight.path, weight.begin, weight, a, b, scale)
