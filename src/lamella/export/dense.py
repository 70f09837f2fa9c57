"""The inverse of slicing: the frozen slices laid side by side are the dense FFN again, bit for bit.

The trainable experts, the routers and their biases are left out; whatever else was trained is kept as it is. Of
attention experts only the routers are left out: their heads are the dense tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamella.config import AttentionMoEConfig, MoEConfig
from lamella.conversion.attention_options import router_tensors
from lamella.conversion.checkpoint import check_tensors, copy_sidecars, read_config, read_folder
from lamella.conversion.families import FAMILIES, SLICED_PREFIX, Family, Shapes, dense_tensors, family_of, may_be_stored
from lamella.conversion.layout import FFNLayout, ffn_layout
from lamella.conversion.pieces import JoinColumns, Piece, Run, Runs
from lamella.conversion.plan import OutputTensor, Plan
from lamella.conversion.slice import moe_tensors
from lamella.conversion.tensors import SourceTensor
from lamella.conversion.transposed import matrices, transposed
from lamella.conversion.write import appearing_folder, check_output, write_json, write_tensors
from lamella.errors import UserError


def to_dense(
    folder: str | Path, out: str | Path, overwrite: bool = False, on_bytes: Callable[[int], None] = lambda _: None
) -> Plan:
    """Write the dense model within a converted checkpoint, streaming tensor by tensor.

    Args:
        folder: a converted checkpoint, trained or not.
        out: the dense folder to make.

    Returns:
        What was written.

    Raises:
        UserError: not a converted checkpoint, tensors that do not match its config, or an `out` that cannot be written.
    """
    folder, out = Path(folder), Path(out)
    config = dense_config(read_config(folder))
    sources = read_folder(folder)
    plan = Plan(dense_tensors_of(folder, sources), config)
    check_output(out, overwrite, plan.total_bytes, {tensor.path for tensor in sources.values()})
    with appearing_folder(out) as temporary:
        copy_sidecars(folder, temporary)
        write_tensors(plan, temporary, on_bytes)
        write_json(temporary / "config.json", config)
    return plan


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """The dense model's config from a converted one's."""
    family = sliced_family(config)
    dense = {key: value for key, value in config.items() if key not in ("moe", "attention_moe", "auto_map")}
    return dense | {"architectures": [family.architecture], "model_type": family.name}


def sliced_family(config: dict[str, Any]) -> Family:
    """The family of a converted checkpoint's config; UserError if it is another kind of model."""
    name = str(config.get("model_type")).removeprefix(SLICED_PREFIX)
    is_converted = any(isinstance(config.get(entry), dict) for entry in ("moe", "attention_moe"))
    if name not in FAMILIES or not is_converted or config["model_type"] == name:
        kinds = ", ".join(SLICED_PREFIX + family for family in FAMILIES)
        raise UserError(f"the model type {config.get('model_type')!r} is not converted; expected one of {kinds}")
    return FAMILIES[name]


def sliced_tensors(config: dict[str, Any]) -> Shapes:
    """Every tensor that a converted checkpoint with this config must hold, with its shape."""
    dense, moe = dense_config(config), ffn_config(config)
    shapes, layout = dense_tensors(dense, family_of(dense)), ffn_layout(dense)
    for layer, layer_moe in {i: moe.for_layer(i) for i in moe.moe_layers}.items() if moe else ():
        for name in layout.names(layer).values():
            del shapes[name]
        own = moe_tensors(layout.hidden_size, layer_moe)
        shapes |= {layout.prefix(layer) + name: shape for name, shape in own.items()}
    if attention := config.get("attention_moe"):
        shapes |= router_tensors(dense["hidden_size"], AttentionMoEConfig.from_dict(attention))
    return shapes


def ffn_config(config: dict[str, Any]) -> MoEConfig | None:
    """The `moe` entry; None where only attention is experts."""
    return None if config.get("moe") is None else MoEConfig.from_dict(config["moe"])


def dense_tensors_of(folder: Path, sources: dict[str, SourceTensor] | None = None) -> list[OutputTensor]:
    """How each dense tensor comes from a converted checkpoint, in the order of the model.

    Raises:
        UserError: the checkpoint's tensors are not those of its config.
    """
    config = read_config(folder)
    sources = read_folder(folder) if sources is None else sources
    dense = dense_config(config)
    check_tensors(sources, sliced_tensors(config), str(folder), lambda name: may_be_stored(name, dense))
    return plan_dense(config, sources).tensors


def plan_dense(config: dict[str, Any], sources: dict[str, SourceTensor]) -> Plan:
    """Tensors and config of the dense model within a converted one, whose tensors have been checked."""
    dense, moe = dense_config(config), ffn_config(config)
    if moe and not moe.num_frozen_experts:
        raise UserError("this model has no frozen slices, so no dense FFN lies in it; give the model it was made of")
    layout = ffn_layout(dense)
    layers = moe.moe_layers if moe else ()
    joined = {name: how for layer in layers for name, how in joined_ffn(layout, layer, sources).items()}
    shapes = dense_tensors(dense, family_of(dense))
    tensors = []
    for name, shape in shapes.items():
        source, piece = joined[name] if name in joined else (sources[name], Runs.copy(sources[name]))
        tensors.append(OutputTensor(name, source.dtype, shape, piece))
    stored = [name for name in sources if name not in shapes and may_be_stored(name, dense)]
    tensors += [OutputTensor(n, sources[n].dtype, sources[n].shape, Runs.copy(sources[n])) for n in stored]
    return Plan(tensors, dense)


def joined_ffn(
    layout: FFNLayout, layer: int, sources: dict[str, SourceTensor]
) -> dict[str, tuple[SourceTensor, Piece]]:
    """dense name -> (the packed tensor it comes from, how) for one layer's FFN."""
    prefix, names = layout.prefix(layer), layout.names(layer)
    down = sources[f"{prefix}experts.frozen_down_proj"]
    if layout.gate is not None:
        gate_up = sources[f"{prefix}experts.frozen_gate_up_proj"]
        return {
            names["gate"]: (gate_up, Runs(_half_runs(gate_up, 0))),
            names["up"]: (gate_up, Runs(_half_runs(gate_up, 1))),
            names["down"]: (down, JoinColumns(down)),
        }
    up, up_bias = (sources[f"{prefix}experts.frozen_{part}"] for part in ("up_proj", "up_bias"))
    down_bias = sources[f"{prefix}output_bias"]
    return {
        names["up"]: (up, _stored_up(up) if layout.transposed else Runs.copy(up)),
        names["up_bias"]: (up_bias, Runs.copy(up_bias)),
        names["down"]: (down, _stored_down(down) if layout.transposed else JoinColumns(down)),
        names["down_bias"]: (down_bias, Runs.copy(down_bias)),
    }


def _stored_up(up: SourceTensor) -> Runs:
    """[S, f, D] -> [D, F], as Conv1D stores it."""
    S, f, D = up.shape
    return Runs.copy(transposed(dataclasses.replace(up, shape=(S * f, D))))


def _stored_down(down: SourceTensor) -> Runs:
    """[S, D, f] -> [F, D]: each slice's [f, D], one after another."""
    parts = (transposed(part) for part in matrices(down))
    return Runs(tuple(Run(part, 0, part.numel) for part in parts))


def _half_runs(gate_up: SourceTensor, half: int) -> tuple[Run, ...]:
    """The gate rows (half 0) or up rows (half 1) of every slice."""
    S, f2, D = gate_up.shape
    count = f2 // 2 * D
    return tuple(Run(gate_up, (2 * i + half) * count, count) for i in range(S))
