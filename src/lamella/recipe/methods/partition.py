"""What a conversion by partition is made of, as a person says it: a recipe's keys are these fields."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

from lamella.architecture.sizes import Parts, check_parts
from lamella.errors import UserError, check_choice
from lamella.recipe.calibration import CalibrationOptions, Guard, check_balance
from lamella.recipe.methods.slice import DTYPE_NAMES, parse_layers

GateName = Literal["unit", "normalised", "softmax"]
OutputName = Literal["refit", "bias", "align", "plain"]


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
class Axes:
    """How to make experts out of a layer's neurons; every axis is independent of the others."""

    neurons: str = "coadapted"
    """Partition of the neurons; see PARTITIONS."""
    parts: int = 16
    """G: parts of equal width that the FFN is cut into."""
    active: int = 8
    """A: parts that each token passes, shared ones included."""
    shared: int | Literal["search"] | None = None
    """s: parts that every token passes; None: half of the active ones. "search" takes, layer by layer, the count that
    reconstructs best, and is that many times slower."""
    router: str = "ridge"
    """Router rows at the start; see ROUTERS."""
    gate: GateName = "unit"
    """unit: 1 + u sigmoid(logit) with u = 0 at the start. normalised: sigmoid scores over their sum. softmax: over all
    experts, then over their sum."""
    scale_factor: float | None = None
    """Factor on normalised and softmax weights; None: the number of chosen experts, so that they are about 1."""
    balance: float | None = 0.01
    """Move the selection biases until MaxVio on the calibration tokens is at most this; None: leave them."""
    output: OutputName = "refit"
    """What makes up for the experts that are not chosen. refit: the down projections, by ridge regression onto what is
    missing (lamella.conversion.partition.refit), and a bias. bias: its mean alone. align: each channel's mean and
    variance are brought to the dense layer's. plain: nothing. With all parts active nothing is missing."""

    def __post_init__(self) -> None:
        check_choice("neurons", self.neurons, PARTITIONS)
        check_choice("router", self.router, ROUTERS)
        check_choice("gate", self.gate, get_args(GateName))
        check_choice("output", self.output, get_args(OutputName))
        if self.gate == "unit" and self.scale_factor is not None:
            raise UserError("scale_factor has no effect on gate 'unit'; leave it out, or choose 'normalised'")
        check_balance(self.balance)

    @property
    def all_active(self) -> bool:
        """Every expert computes every token: with gate "unit" the dense FFN, whatever the router says."""
        return self.active == self.parts

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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PartitionOptions(Axes):
    """The axes of `Axes`, and on what and with what text."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  read by pydantic where a recipe is checked
    method: ClassVar[str] = "partition"
    entry: ClassVar[str] = "moe"

    layers: str = "all"
    """"all", "every:N" (layers 0, N, 2N, ...), or a list such as "0,3,5-9"."""
    first_dense: int = 0
    """The first layers stay dense, this many."""
    last_dense: int = 0
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    sequential: bool = True
    """Calibrate each layer on what it sees behind the converted ones, not behind the dense ones: its router and balance
    are then fitted to what they get (also behind one that the guard puts back). No difference with all parts active."""
    guard: Guard | None = None
    """Test the model after each layer, and put a layer back that exceeds its budget."""
    seed: int = 0
    dtype: str | None = None
    """"float32", "bfloat16" or "float16"; None: that of the source, tensor by tensor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, (*DTYPE_NAMES, None))
        for name in ("first_dense", "last_dense"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or a number of layers")

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

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self, moe: dict[str, Any]) -> str:
        scaled = self.scale_factor is not None and self.scale_factor != moe["num_experts_per_tok"]
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
        return f"""\
- Recipe: method `partition`, neurons by `{self.neurons}`, {self.parts} parts of which {self.active} are active
  (shared: {self.shared}), router `{self.router}`, gate `{self.gate}`, seed {self.seed}.
- {parity}"""
