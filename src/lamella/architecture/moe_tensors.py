"""Every tensor of an MoE layer and of routed attention: its name, its shape, in both homes.

Within the layer the two homes call them alike; the layer's own place is `model.layers.N.mlp.` (or the family's) in
transformers and `layers.N.moe.` in torchtitan.

Shapes: D model width, E experts of a kind, R router rows, f neurons per expert, n neurons of the shared expert.
"""

from __future__ import annotations

from typing import Literal, get_args

from lamella.architecture.moe import AttentionMoEConfig, MoEConfig
from lamella.architecture.types import Shapes

Kind = Literal["frozen", "trainable"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Matrices and vectors of an expert: gated ones have the first two, those of two matrices the others and DOWN.
GATE_UP, DOWN, UP, UP_BIAS = "gate_up_proj", "down_proj", "up_proj", "up_bias"
WEIGHT, SELECTION_BIAS, GATE_SCALE, UP_WEIGHT = "weight", "selection_bias", "gate_scale", "up_weight"
OUTPUT_BIAS = "output_bias"
_ROUTER, _SHARED, _EXPERTS = "router.", "shared.", "experts."
EXPERT_PATTERN = rf"\.experts\.({'|'.join(KINDS)})_"
"""A regular expression for names of routed experts' tensors."""
LORA = ("gate_up_a", "gate_up_b", "down_a", "down_b")
"""The fields of `lamella.moe.lora.Lora`."""

MOE_IN_TITAN = "layers.{}.moe."
ATTENTION_IN_HF, ATTENTION_IN_TITAN = "model.layers.{}.self_attn.", "layers.{}.attention.heads."
"""Where the tensors of routed attention stand."""


def packed_name(kind: Kind, part: str) -> str:
    """The parameter that holds all experts of a kind, within the module `experts`: [E, ...]."""
    return f"{kind}_{part}"


def expert_name(kind: Kind, part: str) -> str:
    """The same within the layer."""
    return _EXPERTS + packed_name(kind, part)


def scales_name(name: str) -> str:
    """The tensor with the scales of rounded experts that are stored under this name."""
    return f"{name}_scales"


def lora_name(field: str) -> str:
    """The parameter of a low-rank delta, within the module `experts`."""
    return f"lora_{field}"


def expert_lora_name(field: str) -> str:
    """The same within the layer."""
    return _EXPERTS + lora_name(field)


def shared_name(part: str) -> str:
    """A tensor of the expert that is always on, within the layer."""
    return _SHARED + part


def router_name(part: str) -> str:
    """A tensor of the router, within the layer or within routed attention."""
    return _ROUTER + part


def is_frozen(name: str) -> bool:
    """Whether the tensor of this name, in either home, is of frozen experts."""
    return f".{_EXPERTS}frozen_" in name


def is_expert(name: str) -> bool:
    """Whether it is of experts that tokens are routed to, low-rank deltas too."""
    return f".{_EXPERTS}" in name


def is_lora(name: str) -> bool:
    """Whether it is of low-rank deltas."""
    return f".{_EXPERTS}lora_" in name


def is_router(name: str) -> bool:
    return f".{_ROUTER}" in name


def of_layer(name: str) -> bool:
    """Whether it is of an MoE layer or of routed attention, not of the dense model."""
    return any(f".{part}" in name for part in (_EXPERTS, _ROUTER, _SHARED)) or name.endswith("." + OUTPUT_BIAS)


def is_float32(name: str) -> bool:
    """Whether it is float32 whatever the dtype of the weights: a bf16 bias would lose the steps of balancing."""
    return name.endswith(router_name(SELECTION_BIAS))


def expert_shapes(hidden_size: int, width: int, gated: bool) -> Shapes:
    """The tensors of one expert of `width` neurons, gated or of two matrices."""
    D, f = hidden_size, width
    if gated:
        return {GATE_UP: (2 * f, D), DOWN: (D, f)}
    return {UP: (f, D), UP_BIAS: (f,), DOWN: (D, f)}


def moe_tensors(D: int, moe: MoEConfig) -> Shapes:
    """Names and shapes within one converted layer, in the place of its FFN; `moe` is that layer's config."""
    n = moe.shared_intermediate_size
    shapes: Shapes = {}
    for kind, E in (("frozen", moe.num_frozen_experts), ("trainable", moe.num_trainable_experts)):
        if E:
            one = expert_shapes(D, moe.moe_intermediate_size, moe.gated)
            shapes |= {expert_name(kind, part): (E, *shape) for part, shape in one.items()}  # type: ignore[arg-type]
    shapes |= {expert_lora_name(field): shape for field, shape in moe.lora_shapes(D).items()}
    if n:
        shapes |= {shared_name(part): shape for part, shape in expert_shapes(D, n, moe.gated).items()}
    shapes |= router_shapes(D, moe)
    if moe.output_bias:
        shapes[OUTPUT_BIAS] = (D,)
    return shapes


def router_shapes(D: int, moe: MoEConfig | AttentionMoEConfig) -> Shapes:
    """The tensors of a router, by name within what it routes."""
    R = moe.num_router_rows
    shapes: Shapes = {router_name(WEIGHT): (R, D), router_name(SELECTION_BIAS): (R,)}
    if moe.router == "analytic":
        shapes[router_name(UP_WEIGHT)] = (R, D)
    if moe.gate == "unit":
        shapes[router_name(GATE_SCALE)] = (R,)
    return shapes


_ROUTER_NAMES = tuple(router_name(part) for part in (WEIGHT, UP_WEIGHT, GATE_SCALE, SELECTION_BIAS))
GATED_NAMES = (
    *_ROUTER_NAMES,
    *(shared_name(part) for part in (GATE_UP, DOWN)),
    OUTPUT_BIAS,
    *(expert_name(kind, part) for kind in KINDS for part in (GATE_UP, DOWN)),
    *(expert_lora_name(field) for field in LORA),
)
"""All that a layer of gated experts can hold."""
ROUTED_ATTENTION_NAMES = tuple(name for name in _ROUTER_NAMES if name != router_name(UP_WEIGHT))
PARAMETERS = tuple(dict.fromkeys(name.rpartition(".")[2] for name in GATED_NAMES))
"""The last parts of these names, what modules call their parameters."""
