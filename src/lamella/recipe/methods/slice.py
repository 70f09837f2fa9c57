"""Method "slice": what a recipe may say about it, and the sizes that come of it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import MoEConfig, RoutingKind
from lamella.architecture.sizes import check_slices
from lamella.recipe.methods.common import FFNOptions, SliceGate, noise_problems, parse_layers


@dataclass(frozen=True)
class SliceOptions(FFNOptions):
    """Cut every FFN into frozen slices and trainable copies of them; the logits stay the dense model's."""

    method: ClassVar[str] = "slice"

    slices: int = 8
    """Each FFN is cut into this many parts, which must divide its width."""
    noise: float = 0.02
    """The trainable copies get normal noise of this standard deviation, in units of each dense matrix's own."""
    routing: RoutingKind = "twin"
    """The router chooses one of each slice and its copy (twin), or any top_k of the experts (flat)."""
    gate: SliceGate = "sigmoid"
    """This function makes scores of the router's logits: sigmoid, each alone, or softmax, over all of them."""
    top_k: int | None = None
    """Each token is computed by this many experts; null takes the number of slices."""

    def problems(self) -> list[str]:
        return noise_problems(self.noise)

    def describe(self, entry: dict[str, Any]) -> str:
        exact = entry["num_experts_per_tok"] == entry["num_frozen_experts"]
        parity = (
            "As converted, every token goes to all frozen experts with weight 1: the logits are the dense model's."
            if exact
            else "Top-k is not the number of slices, so the logits differ from the dense model's."
        )
        return f"""\
- Recipe: method `slice`, {self.slices} slices per FFN, seed {self.seed}, noise {self.noise}
  (in standard deviations of each dense matrix).
- Each layer with experts has {entry["num_frozen_experts"]} frozen experts (the slices: their sum is the dense FFN) and
  {entry["num_trainable_experts"]} trainable copies.
- {parity}"""


def slice_sizes(options: SliceOptions, config: dict[str, Any]) -> MoEConfig:
    """The `moe` entry that slicing adds to a dense config.json. UserError where they do not fit each other."""
    top_k = options.slices if options.top_k is None else options.top_k
    layout = ffn_layout(config)
    return MoEConfig(
        num_frozen_experts=options.slices,
        num_trainable_experts=options.slices,
        moe_intermediate_size=check_slices(layout.ffn_width, options.slices),
        num_experts_per_tok=top_k,
        moe_layers=parse_layers(options.layers, layout.num_layers),
        routing=options.routing,
        gate=options.gate,
        route_scale=float(top_k),
        output_bias=layout.output_bias,
        gated=layout.gated,
        activation=layout.activation,
    )
