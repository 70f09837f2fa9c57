"""Method "upcycle": what a recipe may say about it, and the sizes that come of it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import MoEConfig
from lamella.architecture.sizes import check_slices
from lamella.recipe.methods.common import FFNOptions, SliceGate, noise_problems, parse_layers


@dataclass(frozen=True)
class UpcycleOptions(FFNOptions):
    """Repeat every FFN, whole or in shards, for more parameters; a router learns to tell the copies apart."""

    method: ClassVar[str] = "upcycle"

    experts: int = 8
    """Each FFN is copied this many times."""
    granularity: int = 1
    """Each copy is cut into this many shards, which must divide the FFN's width."""
    top_k: int = 2
    """Each token is computed by this many copies: in shards, by top_k * granularity experts."""
    gate: SliceGate = "softmax"
    """This function makes scores of the router's logits: sigmoid, each alone, or softmax, over all of them."""
    noise: float = 0.0
    """The copies get normal noise of this standard deviation, in units of each dense matrix's own."""
    redraw: float = 0.0
    """This share of each expert's neurons is drawn anew (drop-upcycling, arXiv 2502.19261, with 0.5)."""
    identity: bool = False
    """The dense FFN stays as a shared expert, and the copies add 0 at the start."""
    router_std: float = 0.02
    """The router's rows, which decide among equal copies at the start, are drawn with this standard deviation."""

    def problems(self) -> list[str]:
        found = noise_problems(self.noise)
        if not 1 <= self.top_k <= self.experts:
            found.append(f"top_k is {self.top_k}; it must be 1 to the {self.experts} copies")
        if not 0 <= self.redraw <= 1:
            found.append(f"redraw is {self.redraw}; it must be a share from 0 to 1")
        if not self.router_std > 0:
            found.append(f"router_std is {self.router_std}; equal rows could not tell the copies apart, raise it")
        return found

    def describe(self, entry: dict[str, Any]) -> str:
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


def upcycle_sizes(options: UpcycleOptions, config: dict[str, Any]) -> MoEConfig:
    """The `moe` entry that upcycling adds to a dense config.json. UserError where they do not fit each other."""
    G, layout = options.granularity, ffn_layout(config)
    return MoEConfig(
        num_frozen_experts=0,
        num_trainable_experts=options.experts * G,
        moe_intermediate_size=check_slices(layout.ffn_width, G),
        num_experts_per_tok=options.top_k * G,
        moe_layers=parse_layers(options.layers, layout.num_layers),
        routing="flat",
        gate=options.gate,
        route_scale=float(G),
        shared_intermediate_size=layout.ffn_width if options.identity else 0,
        output_bias=layout.output_bias,
        gated=layout.gated,
        activation=layout.activation,
    )
