"""How to slice, as a person says it."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

from lamella.architecture.moe import RoutingKind
from lamella.errors import UserError, check_choice

# config.json's names -> safetensors' codes.
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Gate "unit" does not weigh a slice against its copy.
SliceGate = Literal["sigmoid", "softmax"]


class Options(Protocol):
    """What every method's options are: a frozen dataclass whose fields are the recipe's keys."""

    method: ClassVar[str]
    entry: ClassVar[str]
    """What the method adds to config.json: "moe" or "attention_moe"."""

    def to_dict(self) -> dict[str, Any]: ...

    def describe(self, moe: dict[str, Any]) -> str:
        """Lines of the model card about the method, given its entry of the new config."""
        ...


@dataclass(frozen=True)
class SliceOptions:
    """How to slice; the `recipe` of the manifest."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic where a recipe is checked
    method: ClassVar[str] = "slice"
    entry: ClassVar[str] = "moe"

    slices: int = 8
    """Parts that each FFN is cut into; must divide its width."""
    noise: float = 0.02
    """Standard deviation of what is added to the copies, in units of the dense matrix's own."""
    seed: int = 0
    layers: str = "all"
    """"all", "every:N" (layers 0, N, 2N, ...), or a list such as "0,3,5-9"."""
    routing: RoutingKind = "twin"
    gate: SliceGate = "sigmoid"
    top_k: int | None = None
    """Experts per token; None: as many as slices."""
    dtype: str | None = None
    """"float32", "bfloat16" or "float16"; None: that of the source, tensor by tensor."""

    def __post_init__(self) -> None:
        check_choice("routing", self.routing, get_args(RoutingKind))
        check_choice("gate", self.gate, get_args(SliceGate))
        check_choice("dtype", self.dtype, (*DTYPE_NAMES, None))
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"noise is {self.noise}; it must be 0 or a positive number")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self, moe: dict[str, Any]) -> str:
        exact = moe["num_experts_per_tok"] == moe["num_frozen_experts"]
        parity = (
            "As converted, every token goes to all frozen experts with weight 1: the logits are the dense model's."
            if exact
            else "Top-k is not the number of slices, so the logits differ from the dense model's."
        )
        return f"""\
- Recipe: method `slice`, {self.slices} slices per FFN, seed {self.seed}, noise {self.noise}
  (in standard deviations of each dense matrix).
- Each layer with experts has {moe["num_frozen_experts"]} frozen experts (the slices: their sum is the dense FFN) and
  {moe["num_trainable_experts"]} trainable copies.
- {parity}"""


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
