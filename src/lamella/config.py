"""Every setting that more than one room reads. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lamella.errors import UserError, did_you_mean

RoutingKind = Literal["twin", "flat"]
GateKind = Literal["sigmoid", "softmax"]
# What a layer computes: "routed" asks its router; "dense" and "learned" run the frozen slices or their trainable
# copies alone, each with weight 1; "random" draws the experts by chance, each with weight 1 (a control).
Mode = Literal["routed", "dense", "learned", "random"]
ExpertPath = Literal["auto", "loop", "batched", "grouped", "tiled"]

# Added to a twin's score and taken from its slice's, this bias sends every token to the frozen slice (scores lie
# in [0, 1], so the pair's scores differ by at most 1): the dense model, whatever the router says.
DENSE_BIAS = -1.0


@dataclass(frozen=True)
class MoEConfig:
    """The `moe` entry of a converted model's config.json.

    Experts 0 .. num_frozen_experts-1 are the frozen slices of the dense FFN; the trainable ones follow, the copy of
    slice i at num_frozen_experts + i.
    """

    num_frozen_experts: int
    num_trainable_experts: int
    moe_intermediate_size: int
    """Neurons per expert: the dense FFN width over the number of slices."""
    num_experts_per_tok: int
    moe_layers: tuple[int, ...]
    """Layers whose FFN became experts, ascending; the others stay dense."""
    routing: RoutingKind = "twin"
    gate: GateKind = "sigmoid"
    norm_topk_prob: bool = True
    """Divide the chosen scores by their sum before scaling."""
    route_scale: float = 8.0
    """Factor on the gate weights; with norm_topk_prob it must be num_experts_per_tok to reproduce the dense sum."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "moe_layers", tuple(self.moe_layers))
        for name, choices in (("routing", get_args(RoutingKind)), ("gate", get_args(GateKind))):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"{name} is {value!r}; it must be one of {', '.join(choices)}{did_you_mean(value, choices)}"
                )
        for name in ("num_frozen_experts", "moe_intermediate_size", "num_experts_per_tok"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"top-k {self.num_experts_per_tok} is larger than the {self.num_experts} experts; "
                "lower top-k or raise the slices"
            )
        if self.routing == "twin":
            if self.num_frozen_experts != self.num_trainable_experts:
                raise UserError(
                    f"twin routing pairs every slice with a copy, but there are {self.num_frozen_experts} frozen and "
                    f"{self.num_trainable_experts} trainable experts; use routing 'flat'"
                )
            if self.num_experts_per_tok != self.num_frozen_experts:
                raise UserError(
                    f"twin routing chooses one of each pair, so top-k must be {self.num_frozen_experts}, "
                    f"not {self.num_experts_per_tok}; use routing 'flat' for another top-k"
                )

    @property
    def num_experts(self) -> int:
        return self.num_frozen_experts + self.num_trainable_experts

    @property
    def num_router_rows(self) -> int:
        """Rows of the router matrix: one per pair in twin routing, one per expert in flat routing."""
        return self.num_frozen_experts if self.routing == "twin" else self.num_experts

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """Read the `moe` entry of config.json; unknown or missing keys are a UserError."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise UserError(f"unknown key {key!r} in the moe config{did_you_mean(key, fields)}")
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if missing:
            raise UserError(f"the moe config lacks {', '.join(missing)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"moe_layers": list(self.moe_layers)}
