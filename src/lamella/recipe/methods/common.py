"""What the options of several methods of conversion share. Imports no torch."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lamella.errors import UserError
from lamella.recipe.check import Options

DtypeName = Literal["float32", "bfloat16", "float16"]
# config.json's names -> safetensors' codes.
DTYPE_NAMES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Gate "unit" does not weigh a slice against its copy.
SliceGate = Literal["sigmoid", "softmax"]


class MethodOptions(Options, ABC):
    """How to convert by one method; the `recipe` of the manifest."""

    method: ClassVar[str]
    entry: ClassVar[str]
    """What the method adds to config.json: "moe", "attention_moe" or "adapters"."""

    @abstractmethod
    def describe(self, entry: dict[str, Any]) -> str:
        """Lines of the model card about the method, given its entry of the new config."""


@dataclass(frozen=True)
class FFNOptions(MethodOptions):
    """What the methods that make experts of FFNs have in common."""

    entry: ClassVar[str] = "moe"

    layers: str = "all"
    """These layers are converted: all, every:N (layers 0, N, 2N, ...), or a list such as 0,3,5-9."""
    seed: int = 0
    """Whatever the method draws at random (noise, neurons, router rows) is drawn from this seed."""
    dtype: DtypeName | None = None
    """The weights are stored as float32, bfloat16 or float16; null keeps each tensor's own."""


def noise_problems(noise: float) -> list[str]:
    """What is wrong with a standard deviation of noise."""
    return [] if math.isfinite(noise) and noise >= 0 else [f"noise is {noise}; it must be 0 or a positive number"]


def parse_layers(text: str, num_layers: int) -> tuple[int, ...]:
    """The layers that "all", "every:N" or a list such as "0,3,5-9" names, ascending; a UserError if not there."""
    if text == "all":
        return tuple(range(num_layers))
    if match := re.fullmatch(r"every:([1-9]\d*)", text):
        return tuple(range(0, num_layers, int(match[1])))
    layers: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part)):
            raise UserError(f"layers is {text!r}; write all, every:N, or a list such as 0,3,5-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise UserError(f"layers names {part}, but the model has the layers 0-{num_layers - 1}")
        layers |= set(range(first, last + 1))
    return tuple(sorted(layers))
