"""Method "partition": what a recipe may say about it, and the sizes that come of it. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from lamella.architecture.layout import ffn_layout
from lamella.architecture.moe import GateKind, MoEConfig
from lamella.architecture.sizes import Parts, check_parts
from lamella.errors import UserError, check_choice
from lamella.recipe.calibration import CalibrationOptions, Guard, balance_problems
from lamella.recipe.check import Options
from lamella.recipe.methods.common import FFNOptions, parse_layers

GateName = Literal["unit", "normalised", "softmax"]
OutputName = Literal["refit", "bias", "align", "plain"]
AllocationName = Literal["even", "sensitivity"]
# As config.json has them.
GATES: dict[GateName, GateKind] = {"unit": "unit", "normalised": "sigmoid", "softmax": "softmax"}


class Choice(NamedTuple):
    """One value of an axis: the function behind it, and what of a layer it looks at."""

    function: str
    """MODULE:FUNCTION, imported when it is used."""
    needs_sample: bool = False
    """It looks at calibration tokens; others at the weights alone."""
    needs_gradient: bool = False
    """It needs the loss's gradient at the hidden activations, dh."""


PARTITIONS = {
    "contiguous": Choice("lamella.conversion.partition.contiguous:contiguous"),
    "random": Choice("lamella.conversion.partition.shuffled:shuffled"),
    "kmeans": Choice("lamella.conversion.partition.weight_clusters:weight_clusters"),
    "coactivation": Choice("lamella.conversion.partition.coactivation:coactivation", needs_sample=True),
    "gradient-max": Choice(
        "lamella.conversion.partition.gradient:gradient_max", needs_sample=True, needs_gradient=True
    ),
    "gradient-sharing": Choice(
        "lamella.conversion.partition.gradient:gradient_sharing", needs_sample=True, needs_gradient=True
    ),
    "coadapted": Choice("lamella.conversion.partition.coadapted:coadapted", needs_sample=True, needs_gradient=True),
}
ROUTERS = {
    "zero": Choice("lamella.conversion.partition.routers_plain:zero_router"),
    "random": Choice("lamella.conversion.partition.routers_plain:random_router"),
    "kmeans": Choice("lamella.conversion.partition.router_kmeans:kmeans_router", needs_sample=True),
    "analytic": Choice("lamella.conversion.partition.router_analytic:analytic_router", needs_sample=True),
    "ridge": Choice("lamella.conversion.partition.router_ridge:ridge_router", needs_sample=True),
}


@dataclass(frozen=True)
class Axes(Options):
    """How to make experts out of a layer's neurons; every axis is independent of the others."""

    neurons: str = "coadapted"
    """The neurons are divided into parts by contiguous, random, kmeans, coactivation, gradient-max, gradient-sharing
    or coadapted."""
    parts: int = 32
    """The FFN is cut into this many parts of equal width, G."""
    active: int = 16
    """Each token passes this many parts, A, shared ones included; the mean over the layers where they differ."""
    allocation: AllocationName | None = None
    """Every layer has as many parts active (even), or those more, from 3/4 to 3/2 of the mean, where leaving neurons
    out raises the loss more (sensitivity). null takes sensitivity with refit and a partition by gradients, and even
    otherwise: the formats that others serve have room for layers that are alike."""
    shared: int | Literal["search"] | None = None
    """Every token passes this many parts, s; null takes half of the active ones. search takes, layer by layer, the
    count that reconstructs best, and is that many times slower."""
    router: str = "ridge"
    """The router starts from zero, random, kmeans, analytic or ridge (regression onto what each expert adds)."""
    gate: GateName = "unit"
    """A chosen expert is weighed by 1 + u sigmoid(logit) with u = 0 at the start (unit), by sigmoid scores over their
    sum (normalised), or by a softmax over all experts, over the chosen ones' sum (softmax)."""
    scale_factor: float | None = None
    """The weights of normalised and softmax are multiplied by it; null takes the number of chosen experts, so that
    they are about 1."""
    balance: float | None = 0.01
    """The selection biases are moved until MaxVio on the calibration tokens is at most this; null leaves them."""
    output: OutputName = "refit"
    """This makes up for the experts that are not chosen. refit: new down projections, by ridge regression onto what is
    missing, and a bias. bias: the mean of what is missing. align: each channel gets the dense layer's mean and
    variance. plain: nothing. With all parts active nothing is missing."""

    def problems(self) -> list[str]:
        found = []
        for name, known in (("neurons", PARTITIONS), ("router", ROUTERS)):
            try:
                check_choice(name, getattr(self, name), known)
            except UserError as error:
                found.append(str(error))
        if self.allocation == "sensitivity" and self.neurons in PARTITIONS and not self.needs_gradient:
            found.append(
                f"allocation 'sensitivity' needs the loss's gradient, which neurons '{self.neurons}' does without; "
                "choose 'even', or neurons 'coadapted'"
            )
        if self.allocation == "sensitivity" and self.shared == "search":
            found.append("shared: search looks at each layer by itself; choose allocation 'even', or a number of parts")
        if self.gate == "unit" and self.scale_factor is not None:
            found.append("scale_factor has no effect on gate 'unit'; leave it out, or choose 'normalised'")
        return found + balance_problems(self.balance)

    @property
    def all_active(self) -> bool:
        """Every expert computes every token: with gate "unit" the dense FFN, whatever the router says."""
        return self.active == self.parts

    @property
    def allocates(self) -> bool:
        """Whether the layers' active parts are chosen by what they cost."""
        if self.all_active:
            return False
        if self.allocation is not None:
            return self.allocation == "sensitivity"
        return self.output == "refit" and self.needs_gradient and self.shared != "search"

    @property
    def needs_gradient(self) -> bool:
        return PARTITIONS[self.neurons].needs_gradient

    @property
    def needs_sample(self) -> bool:
        searched = self.shared == "search" and not self.all_active
        moved = not self.all_active and (self.output != "plain" or self.balance is not None)
        return searched or moved or PARTITIONS[self.neurons].needs_sample or ROUTERS[self.router].needs_sample

    def check(self, ffn_width: int) -> None:
        """UserError where the counts do not fit each other or the FFN."""
        check_parts(ffn_width, Parts(self.parts, self.fixed_shared or 0, self.active))

    @property
    def fixed_shared(self) -> int | None:
        """s where it is known before the weights are seen."""
        if self.shared == "search":
            return 0 if self.all_active else None
        return self.active // 2 if self.shared is None else self.shared

    @property
    def adds_bias(self) -> bool:
        """Whether what is missing of the output becomes a bias."""
        return self.output != "plain" and not self.all_active


@dataclass(frozen=True)
class Heal(Options):
    """Short training of the converted FFNs, within the conversion: they learn to give the dense model's next-token
    distribution again."""

    tokens: int = 200_000
    """They are trained on this many tokens of the calibration's texts, which are read again where they are shorter."""
    lr: float = 3e-4
    """The learning rate (AdamW) rises to this, and falls to nothing at the end."""
    tokens_per_step: int = 512
    """A step takes this many tokens, at least one window."""

    def problems(self) -> list[str]:
        found = [
            f"heal.{name} is {getattr(self, name)}; it must be at least 1"
            for name in ("tokens", "tokens_per_step")
            if getattr(self, name) < 1
        ]
        if not (math.isfinite(self.lr) and self.lr > 0):
            found.append(f"heal.lr is {self.lr}; it must be a positive number")
        return found


@dataclass(frozen=True)
class PartitionOptions(Axes, FFNOptions):
    """Divide the neurons of every FFN among experts, of which each token passes some."""

    method: ClassVar[str] = "partition"

    first_dense: int = 0
    """This many of the first layers stay dense."""
    last_dense: int = 0
    """This many of the last layers stay dense."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """The text that the layers are shown; `calibration: SOURCE` alone names it."""
    sequential: bool = True
    """Each layer is calibrated on what it sees behind the converted ones, not behind the dense ones: its router and
    balance are then fitted to what they get (also behind one that the guard puts back). With all parts active it makes
    no difference."""
    heal: Heal | None = None
    """The converted FFNs are trained for a short while; null trains nothing. `heal: {}` takes its defaults."""
    guard: Guard | None = None
    """The model is tested after each layer, and a layer that exceeds its budget is put back; null tests nothing."""

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("first_dense", "last_dense"):
            if getattr(self, name) < 0:
                found.append(f"{name} is {getattr(self, name)}; it must be 0 or a number of layers")
        if self.heal is not None and self.all_active:
            found.append("with all parts active there is nothing to heal; leave heal out, or lower active")
        if self.heal is not None and self.heal.tokens < self.calibration.sequence_length:
            found.append(
                f"{self.heal.tokens} tokens of healing do not fill a window of {self.calibration.sequence_length}"
            )
        return found

    def chosen_layers(self, num_layers: int) -> tuple[int, ...]:
        """Ascending; UserError if none is left."""
        inner = range(self.first_dense, num_layers - self.last_dense)
        chosen = tuple(layer for layer in parse_layers(self.layers, num_layers) if layer in inner)
        if not chosen:
            raise UserError(
                f"layers {self.layers} with first_dense {self.first_dense} and last_dense {self.last_dense} leave none "
                f"of the model's {num_layers} to convert"
            )
        return chosen

    def axes(self) -> Axes:
        return Axes(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Axes)})

    def describe(self, entry: dict[str, Any]) -> str:
        scaled = self.scale_factor is not None and self.scale_factor != entry["num_experts_per_tok"]
        even = self.gate == "unit" or self.router == "zero"
        if not self.all_active:
            share = f"{self.active / self.parts:.0%}"
            parity = f"{share} of the neurons are active per token: the logits differ from the dense model's; train it."
        elif scaled:
            parity = (
                f"The experts' outputs are scaled by {self.scale_factor:g}: the logits differ from the dense model's."
            )
        elif even:
            parity = "All experts are active, each with weight 1 at the start: the logits are the dense model's."
        else:
            parity = "All experts are active, weighed by the router: the logits are nearly the dense model's."
        healed = "" if self.heal is None else f", healed on {self.heal.tokens} tokens"
        mean = " in the mean over the layers" if self.allocates else ""
        return f"""\
- Recipe: method `partition`, neurons by `{self.neurons}`, {self.parts} parts of which {self.active} are active{mean}
  (shared: {self.shared}), router `{self.router}`, gate `{self.gate}`, seed {self.seed}{healed}.
- {parity}"""


def partition_sizes(options: PartitionOptions, config: dict[str, Any]) -> MoEConfig:
    """The `moe` entry that a partition adds to a dense config.json, before anything is calibrated: as if no layer were
    put back and, where the shared parts are searched for, as if there were none.

    Raises:
        UserError: layers that are not there, parts that do not fit the FFN, a router that needs a gate projection.
    """
    layout = ffn_layout(config)
    layers = options.chosen_layers(layout.num_layers)
    options.check(layout.ffn_width)
    if options.router == "analytic" and not layout.gated:
        raise UserError("router 'analytic' is made of gate projections, which this family has none of; use 'ridge'")
    if options.router == "analytic" and layout.activation != "silu":
        raise UserError(f"router 'analytic' computes silu, and this model's FFNs {layout.activation}; use 'ridge'")
    width, shared = layout.ffn_width // options.parts, options.fixed_shared or 0
    chosen = options.active - shared
    return MoEConfig(
        num_frozen_experts=0,
        num_trainable_experts=options.parts - shared,
        moe_intermediate_size=width,
        num_experts_per_tok=chosen,
        moe_layers=layers,
        routing="flat",
        gate=GATES[options.gate],
        route_scale=float(chosen) if options.scale_factor is None else options.scale_factor,
        router="analytic" if options.router == "analytic" else "linear",
        shared_intermediate_size=shared * width,
        output_bias=options.adds_bias or layout.output_bias,
        gated=layout.gated,
        activation=layout.activation,
    )
