"""How attention becomes experts, as a person says it, and what that adds to a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from lamella.architecture.families import Family
from lamella.architecture.moe import AttentionMoEConfig, GateKind
from lamella.architecture.sizes import check_experts
from lamella.errors import UserError, check_choice
from lamella.recipe.calibration import CalibrationOptions, check_balance
from lamella.recipe.methods.slice import parse_layers

# "zero": every expert ties, the first top-k of them are chosen. "random": rows of std RANDOM_STD. "ridge": regression
# of the attention's input onto the norm of what each expert contributes, on calibration text.
RouterStart = Literal["zero", "random", "ridge"]
RANDOM_STD = 0.02
WITH_ATTENTION_EXPERTS = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class AttentionOptions:
    """How to route attention; the `recipe` of the manifest."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic where a recipe is checked
    method: ClassVar[str] = "attention"
    entry: ClassVar[str] = "attention_moe"

    layers: str = "all"
    """As in SliceOptions."""
    experts: int | None = None
    """A multiple of the key/value heads that divides the query heads; None: as many as key/value heads."""
    top_k: int | None = None
    """Experts per token; None: all of them, which with the gate "unit" is the dense attention."""
    gate: GateKind = "unit"
    router: RouterStart | None = None
    """None: "zero" where all experts are chosen, else "ridge", or with another gate than "unit" "random"."""
    route_scale: float | None = None
    """Factor on normalised weights; None: top-k, so that equal weights are 1. Gate "unit" has none."""
    seed: int = 0
    """Of the router "random"."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """Text for the router "ridge"."""
    balance: float | None = None
    """For the router "ridge": move the selection biases until MaxVio on the calibration tokens is at most this; None:
    leave them."""

    def __post_init__(self) -> None:
        check_choice("gate", self.gate, get_args(GateKind))
        check_choice("router", self.router, (*get_args(RouterStart), None))
        if self.router == "ridge" and self.gate != "unit":
            raise UserError(f"router 'ridge' predicts norms, which gate {self.gate!r} does not weigh; use gate 'unit'")
        if self.gate == "unit" and self.route_scale is not None:
            raise UserError("gate 'unit' has no route_scale; leave it out")
        if self.balance is not None and (self.router not in ("ridge", None) or self.gate != "unit"):
            raise UserError("balance needs calibration text, which only router 'ridge' reads; use it, with gate 'unit'")
        check_balance(self.balance)

    def router_start(self, num_experts: int, num_chosen: int) -> RouterStart:
        if self.router is not None:
            return self.router
        if num_chosen == num_experts:
            return "zero"
        return "ridge" if self.gate == "unit" else "random"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self, entry: dict[str, Any]) -> str:
        """Lines of the model card, given the `attention_moe` entry of the new config."""
        start = self.router_start(entry["num_experts"], entry["num_experts_per_tok"])
        return f"""\
- Recipe: method `attention`, router start `{start}`, seed {self.seed}. The attention is
  {entry["num_experts"]} experts (query heads that share a key/value head). Each attends over the tokens that were
  routed to it, and its cache holds only these."""


def attention_config(config: dict[str, Any], family: Family, options: AttentionOptions) -> AttentionMoEConfig:
    """The `attention_moe` entry for a model, given its dense or converted config.json.

    Raises:
        UserError: a family without attention experts, layers that are not there, experts that do not fit the heads.
    """
    if family.name not in WITH_ATTENTION_EXPERTS:
        known = ", ".join(WITH_ATTENTION_EXPERTS)
        raise UserError(f"the attention of {family.name} cannot become experts; that of {known} can")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", family.default_kv_heads) or heads
    experts = kv_heads if options.experts is None else options.experts
    top_k = experts if options.top_k is None else options.top_k
    check_experts(experts, heads, kv_heads)
    layers = parse_layers(options.layers, config["num_hidden_layers"])
    scale = options.route_scale
    if scale is None:
        scale = 1.0 if options.gate == "unit" else float(top_k)
    return AttentionMoEConfig(layers, experts, top_k, gate=options.gate, route_scale=scale)
