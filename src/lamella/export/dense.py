"""The inverse of slicing: the frozen slices laid side by side are the dense FFN again, bit for bit.

The trainable experts, the routers and their biases are left out; whatever else was trained is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamella.config import MoEConfig
from lamella.convert.checkpoint import check_tensors, copy_sidecars, read_config, read_folder
from lamella.convert.families import FAMILIES, SLICED_PREFIX, Family, Shapes, dense_tensors, family_of, may_be_stored
from lamella.convert.pieces import JoinColumns, Piece, Run, Runs
from lamella.convert.plan import OutputTensor, Plan
from lamella.convert.slice import ffn_prefix, moe_tensors
from lamella.convert.tensors import SourceTensor
from lamella.convert.write import appearing_folder, check_output, write_json, write_tensors
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
    dense = {key: value for key, value in config.items() if key not in ("moe", "auto_map")}
    return dense | {"architectures": [family.architecture], "model_type": family.name}


def sliced_family(config: dict[str, Any]) -> Family:
    """The family of a converted checkpoint's config; UserError if it is another kind of model."""
    name = str(config.get("model_type")).removeprefix(SLICED_PREFIX)
    if name not in FAMILIES or not isinstance(config.get("moe"), dict) or config["model_type"] == name:
        kinds = ", ".join(SLICED_PREFIX + family for family in FAMILIES)
        raise UserError(f"the model type {config.get('model_type')!r} is not converted; expected one of {kinds}")
    return FAMILIES[name]


def sliced_tensors(config: dict[str, Any]) -> Shapes:
    """Every tensor that a converted checkpoint with this config must hold, with its shape."""
    dense, moe = dense_config(config), MoEConfig.from_dict(config["moe"])
    shapes = dense_tensors(dense, family_of(dense))
    for layer in moe.moe_layers:
        prefix = ffn_prefix(layer)
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
        shapes |= {prefix + name: shape for name, shape in moe_tensors(dense["hidden_size"], moe).items()}
    return shapes


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
    dense, moe = dense_config(config), MoEConfig.from_dict(config["moe"])
    joined = {ffn_prefix(layer): joined_ffn(ffn_prefix(layer), sources) for layer in moe.moe_layers}
    shapes = dense_tensors(dense, family_of(dense))
    tensors = []
    for name, shape in shapes.items():
        prefix = name[: name.find("mlp.") + 4] if ".mlp." in name else ""
        source, piece = joined[prefix][name] if prefix in joined else (sources[name], Runs.copy(sources[name]))
        tensors.append(OutputTensor(name, source.dtype, shape, piece))
    stored = [name for name in sources if name not in shapes and may_be_stored(name, dense)]
    tensors += [OutputTensor(n, sources[n].dtype, sources[n].shape, Runs.copy(sources[n])) for n in stored]
    return Plan(tensors, dense)


def joined_ffn(prefix: str, sources: dict[str, SourceTensor]) -> dict[str, tuple[SourceTensor, Piece]]:
    """dense name -> (the packed tensor it comes from, how) for one layer's three matrices."""
    gate_up, down = (sources[f"{prefix}experts.frozen_{part}_proj"] for part in ("gate_up", "down"))
    return {
        f"{prefix}gate_proj.weight": (gate_up, Runs(_half_runs(gate_up, 0))),
        f"{prefix}up_proj.weight": (gate_up, Runs(_half_runs(gate_up, 1))),
        f"{prefix}down_proj.weight": (down, JoinColumns(down)),
    }


def _half_runs(gate_up: SourceTensor, half: int) -> tuple[Run, ...]:
    """The gate rows (half 0) or up rows (half 1) of every slice."""
    S, f2, D = gate_up.shape
    count = f2 // 2 * D
    return tuple(Run(gate_up, (2 * i + half) * count, count) for i in range(S))
