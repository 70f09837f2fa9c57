"""What a conversion by upcycling may say. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from lamella.errors import UserError, check_choice
from lamella.recipe.methods.slice import DTYPE_NAMES, SliceGate


@dataclass(frozen=True)
class UpcycleOptions:
    """How many copies of the FFN, and how they differ; the `recipe` of the manifest."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic where a recipe is checked
    method: ClassVar[str] = "upcycle"
    entry: ClassVar[str] = "moe"

    experts: int = 8
    """C: copies of the FFN."""
    granularity: int = 1
    """G: shards that each copy is cut into; must divide the FFN's width."""
    top_k: int = 2
    """Copies that a token passes; in shards, top_k * granularity experts."""
    gate: SliceGate = "softmax"
    noise: float = 0.0
    """Standard deviation of what is added to the copies, in units of the dense matrix's own."""
    redraw: float = 0.0
    """Share of each expert's neurons that are drawn anew; 0.5 in the paper."""
    identity: bool = False
    """The dense FFN stays as a shared expert, and the copies add 0 at the start."""
    router_std: float = 0.02
    """Of the router's rows, which decide among equal copies at the start."""
    seed: int = 0
    layers: str = "all"
    """"all", "every:N" (layers 0, N, 2N, ...), or a list such as "0,3,5-9"."""
    dtype: str | None = None
    """"float32", "bfloat16" or "float16"; None: that of the source, tensor by tensor."""

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, get_args(SliceGate))
        check_choice("dtype", self.dtype, (*DTYPE_NAMES, None))
        if not 1 <= self.top_k <= self.experts:
            raise UserError(f"top_k is {self.top_k}; it must be 1 to the {self.experts} copies")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"noise is {self.noise}; it must be 0 or a positive number")
        if not 0 <= self.redraw <= 1:
            raise UserError(f"redraw is {self.redraw}; it must be a share from 0 to 1")
        if not self.router_std > 0:
            raise UserError(f"router_std is {self.router_std}; equal rows could not tell the copies apart, raise it")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self, moe: dict[str, Any]) -> str:
        exact = self.identity or not (self.noise or self.redraw)
        parity = (
            "At the start the copies add up to the dense FFN: the logits are the dense model's."
            if exact
            else "The copies differ from the dense FFN, and the logits from the dense model's."
        )
        return f"""\
- Recipe: method `upcycle`, {self.experts} copies of each FFN in {self.granularity} shards, noise {self.noise},
  redrawn {self.redraw}, seed {self.seed}.
- {parity}"""
