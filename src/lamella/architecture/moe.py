"""How a converted model's layers route and compute: `moe` and `attention_moe` in its config.json. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lamella.errors import UserError, check_choice, did_you_mean
from lamella.jsons import Json

RoutingKind = Literal["twin", "flat"]
# "unit" weighs a chosen expert 1 + u * sigmoid(logit) with a learned u per expert, 0 at conversion: exactly 1 then.
GateKind = Literal["sigmoid", "softmax", "unit"]
# "linear": logits W x. "analytic": |silu(W x) * (V x)|, the hidden activation of one neuron per expert (CMoE,
# arXiv 2502.04416).
RouterKind = Literal["linear", "analytic"]
# transformers' names.
Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"]
# What a layer computes: "routed" asks its router; "dense" and "learned" run the frozen slices or their trainable
# copies alone, each with weight 1; "random" draws the experts by chance, each with weight 1 (a control).
Mode = Literal["routed", "dense", "learned", "random"]
# How the file holds the frozen experts: in the model's dtype, or rounded, with scales beside them.
FrozenDtype = Literal["model", "int8", "int4"]
ExpertPath = Literal["auto", "loop", "batched", "grouped", "fused", "quack", "tiled"]
LORA_PATHS: tuple[ExpertPath, ...] = ("auto", "loop", "grouped")

# Added to a twin's score and taken from its slice's, this bias sends every token to the frozen slice (scores lie
# in [0, 1], so the pair's scores differ by at most 1): the dense model, whatever the router says.
DENSE_BIAS = -1.0

_CHOICES = {
    "routing": get_args(RoutingKind),
    "gate": get_args(GateKind),
    "router": get_args(RouterKind),
    "activation": get_args(Activation),
    "frozen_dtype": get_args(FrozenDtype),
}
_LEAST = {
    "num_frozen_experts": 0,
    "num_trainable_experts": 0,
    "moe_intermediate_size": 1,
    "num_experts_per_tok": 1,
    "shared_intermediate_size": 0,
    "lora_rank": 0,
}


@dataclass(frozen=True)
class MoEConfig:
    """The `moe` entry of a converted model's config.json.

    Experts 0 .. num_frozen_experts-1 are the frozen slices of the dense FFN; the trainable ones follow, the copy of
    slice i at num_frozen_experts + i. A shared expert is always on, with weight 1.
    """

    num_frozen_experts: int
    num_trainable_experts: int
    moe_intermediate_size: int
    """Neurons per expert: the dense FFN width over the number of slices."""
    num_experts_per_tok: int
    moe_layers: tuple[int, ...]
    """The layers whose FFN became experts, in ascending order; the others stay dense."""
    routing: RoutingKind = "twin"
    gate: GateKind = "sigmoid"
    norm_topk_prob: bool = True
    """Divide the chosen scores by their sum before scaling."""
    route_scale: float = 8.0
    """Factor on the gate weights; with norm_topk_prob it must be num_experts_per_tok to reproduce the dense sum. Gate
    "unit" uses neither."""
    router: RouterKind = "linear"
    shared_intermediate_size: int = 0
    """The shared expert has this many neurons; 0: there is none."""
    output_bias: bool = False
    """A bias [D] on the layer's output: the dense FFN's own, or what dropped neurons give on average."""
    gated: bool = True
    """An expert is down (act(gate x) * (up x)); else it has two matrices: down act(up x + up_bias)."""
    activation: Activation = "silu"
    lora_rank: int = 0
    """The rank of the low-rank deltas on the frozen experts' matrices; 0: there are none."""
    lora_alpha: float = 0.0
    """The deltas are scaled by lora_alpha / lora_rank."""
    frozen_dtype: FrozenDtype = "model"
    """How the file holds the frozen experts."""
    per_layer: dict[int, Json] = dataclasses.field(default_factory=dict, hash=False)
    """For a layer, the fields whose values differ there from this config's; see `for_layer`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "moe_layers", tuple(self.moe_layers))
        per_layer = {int(layer): fields for layer, fields in self.per_layer.items()}  # keys of JSON are strings
        object.__setattr__(self, "per_layer", per_layer)
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"top-k {self.num_experts_per_tok} is larger than the {self.num_experts} experts; "
                "lower top-k or raise the slices"
            )
        if self.lora_rank and not (self.gated and self.num_frozen_experts):
            raise UserError("LoRA adds to frozen experts of three matrices, which this model has not; set lora_rank 0")
        if self.routing == "twin":
            self._check_twin()
        for layer in self.per_layer:
            self.for_layer(layer)

    def _check_twin(self) -> None:
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
        if self.gate == "unit":
            raise UserError("gate 'unit' does not weigh the experts of a pair against each other; use 'sigmoid'")

    def for_layer(self, index: int) -> MoEConfig:
        """The config of one layer: this one with the fields that differ there."""
        fields = self.per_layer.get(index)
        if not fields:
            return self
        known = [f.name for f in dataclasses.fields(self) if f.name not in ("moe_layers", "per_layer")]
        for key in fields:
            if key not in known:
                raise UserError(f"per_layer of layer {index}: unknown key {key!r}{did_you_mean(key, known)}")
        return dataclasses.replace(self, per_layer={}, **fields)

    def with_lora(self, rank: int, alpha: float) -> MoEConfig:
        """This config with deltas, or as it is where it has the same; UserError where it has others."""
        if self.lora_rank and (self.lora_rank, self.lora_alpha) != (rank, alpha):
            raise UserError(
                f"the model has LoRA of rank {self.lora_rank} and alpha {self.lora_alpha} already; write the same, or "
                "leave lora out to train it on"
            )
        return dataclasses.replace(self, lora_rank=rank, lora_alpha=alpha)

    def lora_shapes(self, D: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a layer's `lamella.moe.lora.Lora` of model width D, by field; none without deltas."""
        S, f, r = self.num_frozen_experts, self.moe_intermediate_size, self.lora_rank
        if not r:
            return {}
        return {"gate_up_a": (S, 2 * r, D), "gate_up_b": (S, 2 * f, r), "down_a": (S, r, f), "down_b": (S, D, r)}

    @property
    def lora_scale(self) -> float:
        """The low-rank deltas are multiplied by it."""
        return self.lora_alpha / self.lora_rank if self.lora_rank else 0.0

    @property
    def num_experts(self) -> int:
        return self.num_frozen_experts + self.num_trainable_experts

    @property
    def num_router_rows(self) -> int:
        """Rows of the router matrix: one per pair in twin routing, one per expert in flat routing."""
        return self.num_frozen_experts if self.routing == "twin" else self.num_experts

    @classmethod
    def from_dict(cls, values: Json) -> MoEConfig:
        """Read the `moe` entry of config.json; unknown or missing keys are a UserError."""
        return cls(**_known_keys(cls, values, "moe"))

    def to_dict(self) -> Json:
        found = dataclasses.asdict(self) | {"moe_layers": list(self.moe_layers)}
        if self.frozen_dtype == "model":  # so that versions that know nothing of it read the model
            del found["frozen_dtype"]
        return found


@dataclass(frozen=True)
class AttentionMoEConfig:
    """The `attention_moe` entry of a model's config.json: which layers' attention heads are routed experts.

    Expert e has the query heads e*h .. (e+1)*h - 1 (h = query heads over num_experts) and the key/value head that
    these query heads use; experts that are finer than the key/value heads share one.
    """

    layers: tuple[int, ...]
    """Layers whose attention is experts, ascending; the others attend with all heads."""
    num_experts: int
    """A multiple of the key/value heads that divides the query heads."""
    num_experts_per_tok: int
    gate: GateKind = "unit"
    norm_topk_prob: bool = True
    """This field and `route_scale` mean what they mean in `MoEConfig`."""
    route_scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        check_choice("gate", self.gate, get_args(GateKind))
        if self.num_experts < 1 or not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise UserError(
                f"attention top-k is {self.num_experts_per_tok} of {self.num_experts} experts; "
                f"it must be between 1 and the number of experts"
            )

    @property
    def routing(self) -> RoutingKind:
        """This and the properties below have `MoEConfig`'s names, so that both kinds of layers are routed alike."""
        return "flat"

    @property
    def router(self) -> RouterKind:
        return "linear"

    @property
    def num_router_rows(self) -> int:
        return self.num_experts

    @classmethod
    def from_dict(cls, values: Json) -> AttentionMoEConfig:
        """Read the `attention_moe` entry of config.json; unknown or missing keys are a UserError."""
        return cls(**_known_keys(cls, values, "attention_moe"))

    def to_dict(self) -> Json:
        return dataclasses.asdict(self) | {"layers": list(self.layers)}


def _known_keys(cls: type[Any], values: Json, entry: str) -> Json:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise UserError(f"the {entry} config is {values!r}; it must be an object")
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {key!r} in the {entry} config{did_you_mean(key, fields)}")
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in values
    ]
    if missing:
        raise UserError(f"the {entry} config lacks {', '.join(missing)}")
    for key, value in values.items():
        if not _is_of_type(value, str(fields[key].type)):
            raise UserError(f"{key} of the {entry} config is {value!r}; it must be {fields[key].type}")
    return values


def _is_of_type(value: object, kind: str) -> bool:
    """Whether a value of a config.json can be that of a field; a choice is checked by its own list."""
    if kind.startswith("tuple[int"):
        return isinstance(value, list | tuple) and all(_is_of_type(item, "int") for item in value)
    if kind.startswith("dict[int"):
        return isinstance(value, dict) and all(
            str(key).isdecimal() and isinstance(fields, dict) for key, fields in value.items()
        )
    types: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,)}
    return isinstance(value, types.get(kind, (str,))) and isinstance(value, bool) == (kind == "bool")
