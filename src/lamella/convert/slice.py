"""Method "slice": every FFN becomes S frozen slices and S trainable, noisy copies of them.

At conversion the router sends every token to the frozen slices with weight 1, so the logits are the dense model's
(lamella.config.DENSE_BIAS says why).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lamella.config import DENSE_BIAS, MoEConfig
from lamella.convert.checkpoint import Checkpoint
from lamella.convert.families import SLICED_PREFIX, Family, Shapes, dense_tensors, ffn_tensors
from lamella.convert.options import DTYPE_NAMES, SliceOptions, parse_layers
from lamella.convert.pieces import Noise, Piece, Run, Runs, SplitColumns, Values
from lamella.convert.plan import OutputTensor, Plan
from lamella.convert.tensors import SourceTensor
from lamella.errors import UserError
from lamella.moe.slicing import check_slices

REMOTE_CODE = "modeling_lamella"


def plan_slices(source: Checkpoint, options: SliceOptions) -> Plan:
    """All tensors and the config of the sliced model. UserError where options and model do not fit."""
    moe = moe_config(source.config, options)
    tensors: list[OutputTensor] = []
    converted = {f"{ffn_prefix(layer)}{name}": layer for layer in moe.moe_layers for name in ffn_tensors(source.config)}
    for name in in_model_order(source):
        layer = converted.get(name)
        if layer is None:
            tensors.append(_copied(source.tensors[name], options))
        elif name.endswith("gate_proj.weight"):  # the first of the layer's three
            tensors += _sliced_layer(source, ffn_prefix(layer), moe, options)
    return Plan(tensors, sliced_config(source.config, source.family, moe, options.dtype))


def moe_config(dense: dict[str, Any], options: SliceOptions) -> MoEConfig:
    top_k = options.slices if options.top_k is None else options.top_k
    return MoEConfig(
        num_frozen_experts=options.slices,
        num_trainable_experts=options.slices,
        moe_intermediate_size=check_slices(dense["intermediate_size"], options.slices),
        num_experts_per_tok=top_k,
        moe_layers=parse_layers(options.layers, dense["num_hidden_layers"]),
        routing=options.routing,
        gate=options.gate,
        route_scale=float(top_k),
    )


def sliced_config(dense: dict[str, Any], family: Family, moe: MoEConfig, dtype: str | None) -> dict[str, Any]:
    """The dense config with its type changed and the `moe` entry added; every other field stays."""
    config = dense | {
        "architectures": [family.sliced_architecture],
        "model_type": SLICED_PREFIX + family.name,
        "auto_map": {
            "AutoConfig": f"{REMOTE_CODE}.{family.sliced_config}",
            "AutoModelForCausalLM": f"{REMOTE_CODE}.{family.sliced_architecture}",
        },
        "moe": moe.to_dict(),
    }
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in dense else "dtype"] = dtype
    return config


def ffn_prefix(layer: int) -> str:
    return f"model.layers.{layer}.mlp."


def in_model_order(source: Checkpoint) -> Iterator[str]:
    """Names of the dense tensors as the model has them, then those that are merely stored along."""
    expected = dense_tensors(source.config, source.family)
    yield from expected
    yield from (name for name in source.tensors if name not in expected)


def moe_tensors(D: int, moe: MoEConfig) -> Shapes:
    """Names and shapes within one converted layer's `mlp`."""
    f = moe.moe_intermediate_size
    experts: Shapes = {}
    for kind, E in (("frozen", moe.num_frozen_experts), ("trainable", moe.num_trainable_experts)):
        experts |= {f"experts.{kind}_gate_up_proj": (E, 2 * f, D), f"experts.{kind}_down_proj": (E, D, f)}
    return experts | {"router.weight": (moe.num_router_rows, D), "router.selection_bias": (moe.num_router_rows,)}


def _copied(tensor: SourceTensor, options: SliceOptions) -> OutputTensor:
    return OutputTensor(tensor.name, _dtype(tensor, options), tensor.shape, Runs.copy(tensor))


def _dtype(tensor: SourceTensor, options: SliceOptions) -> str:
    return tensor.dtype if options.dtype is None else DTYPE_NAMES[options.dtype]


def _sliced_layer(source: Checkpoint, prefix: str, moe: MoEConfig, options: SliceOptions) -> list[OutputTensor]:
    gate, up, down = (source.tensors[f"{prefix}{part}_proj.weight"] for part in ("gate", "up", "down"))
    if gate.dtype != up.dtype and options.dtype is None:
        raise UserError(f"{gate.name} is {gate.dtype} but {up.name} is {up.dtype}; choose one for all with --dtype")
    noise = Noise(options.noise, options.seed)
    pieces: dict[str, Piece] = {
        "experts.frozen_gate_up_proj": Runs(_gate_up_runs(gate, up, moe)),
        "experts.frozen_down_proj": SplitColumns(down, options.slices),
        "experts.trainable_gate_up_proj": Runs(_gate_up_runs(gate, up, moe), noise),
        "experts.trainable_down_proj": SplitColumns(down, options.slices, noise),
        "router.weight": Values((0.0,), moe.num_router_rows * gate.width),
        "router.selection_bias": Values(selection_bias(moe)),
    }
    dtypes = {name: _dtype(down if "down" in name else gate, options) for name in pieces} | {
        "router.selection_bias": "F32"
    }
    shapes = moe_tensors(gate.width, moe)
    return [OutputTensor(prefix + name, dtypes[name], shapes[name], piece) for name, piece in pieces.items()]


def _gate_up_runs(gate: SourceTensor, up: SourceTensor, moe: MoEConfig) -> tuple[Run, ...]:
    count = moe.moe_intermediate_size * gate.width
    return tuple(Run(matrix, i * count, count) for i in range(moe.num_frozen_experts) for matrix in (gate, up))


def selection_bias(moe: MoEConfig) -> tuple[float, ...]:
    """The biases [R] that send every token to the frozen slices, whatever the router says."""
    if moe.routing == "twin":
        return (DENSE_BIAS,) * moe.num_frozen_experts
    return (0.0,) * moe.num_frozen_experts + (DENSE_BIAS,) * moe.num_trainable_experts
