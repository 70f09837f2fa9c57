"""Method "attention": what a recipe may say about it, and the sizes that come of it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lamella.architecture.model import sizes_of
from lamella.architecture.moe import AttentionMoEConfig, GateKind
from lamella.architecture.rows import names_of
from lamella.architecture.sizes import check_experts
from lamella.errors import UserError
from lamella.recipe.calibration import CalibrationOptions, balance_problems
from lamella.recipe.methods.common import MethodOptions, parse_layers

# "zero": every expert ties, the first top-k of them are chosen. "random": rows of std RANDOM_STD. "ridge": regression
# of the attention's input onto the norm of what each expert contributes, on calibration text.
RouterStart = Literal["zero", "random", "ridge"]
RANDOM_STD = 0.02


@dataclass(frozen=True)
class AttentionOptions(MethodOptions):
    """Make routed experts of the attention heads of a dense or converted model."""

    method: ClassVar[str] = "attention"
    entry: ClassVar[str] = "attention_moe"

    layers: str = "all"
    """These layers are converted: all, every:N (layers 0, N, 2N, ...), or a list such as 0,3,5-9."""
    experts: int | None = None
    """The query heads are divided among this many experts, a multiple of the key/value heads that divides the query
    heads; null takes the number of key/value heads."""
    top_k: int | None = None
    """Each token is attended to by this many experts; null takes all, which with gate unit is the dense attention."""
    gate: GateKind = "unit"
    """A chosen expert is weighed by 1 + u sigmoid(logit) with u = 0 at the start (unit), or by its sigmoid or softmax
    score over the sum of the chosen ones."""
    router: RouterStart | None = None
    """The router starts from zero rows, from random ones, or from a ridge regression onto each expert's norm; null
    takes zero where all experts are chosen, else ridge, or random with another gate than unit."""
    route_scale: float | None = None
    """The weights of gates sigmoid and softmax are multiplied by it; null takes top_k, so that equal weights are 1."""
    seed: int = 0
    """The rows of router random are drawn from this seed."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """The text that router ridge is fitted on; `calibration: SOURCE` alone names it."""
    balance: float | None = None
    """Router ridge moves its selection biases until MaxVio on the calibration tokens is at most this; null leaves
    them."""

    def problems(self) -> list[str]:
        found = []
        if self.router == "ridge" and self.gate != "unit":
            found.append(f"router 'ridge' predicts norms, which gate {self.gate!r} does not weigh; use gate 'unit'")
        if self.gate == "unit" and self.route_scale is not None:
            found.append("gate 'unit' has no route_scale; leave it out")
        if self.balance is not None and (self.router not in ("ridge", None) or self.gate != "unit"):
            found.append("balance needs calibration text, which only router 'ridge' reads; use it, with gate 'unit'")
        return found + balance_problems(self.balance)

    def router_start(self, num_experts: int, num_chosen: int) -> RouterStart:
        if self.router is not None:
            return self.router
        if num_chosen == num_experts:
            return "zero"
        return "ridge" if self.gate == "unit" else "random"

    def describe(self, entry: dict[str, Any]) -> str:
        """Lines of the model card, given the `attention_moe` entry of the new config."""
        start = self.router_start(entry["num_experts"], entry["num_experts_per_tok"])
        return f"""\
- Recipe: method `attention`, router start `{start}`, seed {self.seed}. The attention is
  {entry["num_experts"]} experts (query heads that share a key/value head). Each attends over the tokens that were
  routed to it, and its cache holds only these."""


def attention_sizes(options: AttentionOptions, config: dict[str, Any]) -> AttentionMoEConfig:
    """The `attention_moe` entry that routed attention adds to a dense or converted config.json.

    Raises:
        UserError: a family without attention experts, layers that are not there, experts that do not fit the heads.
    """
    sizes = sizes_of(config)
    if not sizes.family.attention_experts:
        known = ", ".join(names_of(lambda family: family.attention_experts))
        raise UserError(f"the attention of {sizes.family.name} cannot become experts; that of {known} can")
    heads, kv_heads = sizes.N, sizes.G
    experts = kv_heads if options.experts is None else options.experts
    top_k = experts if options.top_k is None else options.top_k
    check_experts(experts, heads, kv_heads)
    layers = parse_layers(options.layers, sizes.num_layers)
    scale = options.route_scale
    if scale is None:
        scale = 1.0 if options.gate == "unit" else float(top_k)
    return AttentionMoEConfig(layers, experts, top_k, gate=options.gate, route_scale=scale)
