"""A model with adapters as experts, in forms that others read: adapters of peft beside the base, or merged experts.

Merged, every adapter and the zero expert become an expert of the dense FFN's size, W + B A, chosen by the same
router. That is lamella's usual form of experts, which `lamella export --to mixtral` carries to a stock architecture.

Shapes: D model width, F FFN width, E experts, N = E - 1 adapters, r rank.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lamella.architecture.adapters import (
    ADAPTERS_IN_HF,
    IN_HF,
    MODULES,
    ROUTER,
    SELECTION_BIAS,
    AdaptersConfig,
    lora_tensor,
)
from lamella.architecture.converted import converted_config, converted_family, converted_tensors, dense_config
from lamella.architecture.families import may_be_stored, sizes_of
from lamella.architecture.moe import MoEConfig
from lamella.architecture.moe_tensors import DOWN, GATE_UP, expert_name, moe_tensors
from lamella.architecture.peft import CONFIG, WEIGHTS, Place, lora_config, tensor_name
from lamella.checkpoint.check import check_tensors
from lamella.checkpoint.manifest import MANIFEST
from lamella.checkpoint.pieces import Piece, Sink, Stretches, checked
from lamella.checkpoint.plan import OutputTensor, WritePlan
from lamella.checkpoint.source import copy_sidecars, read_config, read_folder
from lamella.checkpoint.tensors import SourceTensor
from lamella.checkpoint.write import appearing_folder, check_output, write_json, write_tensors
from lamella.conversion.sidecars import write_remote_code
from lamella.errors import UserError


@dataclass(frozen=True)
class MixFolder:
    """A folder whose tensors have been held against its config; no weight is read."""

    folder: Path
    config: dict[str, object]
    tensors: dict[str, SourceTensor]
    adapters: AdaptersConfig

    @classmethod
    def open(cls, folder: str | Path) -> MixFolder:
        """UserError where it holds no model with adapters as experts."""
        folder = Path(folder)
        config = read_config(folder)
        if config.get("adapters") is None:
            raise UserError(f"{folder} has no adapters as experts; make such a model: lamella convert method=adapters")
        tensors, dense = read_folder(folder), dense_config(config)
        check_tensors(tensors, converted_tensors(config), str(folder), lambda name: may_be_stored(name, dense))
        return cls(folder, config, tensors, AdaptersConfig.from_dict(config["adapters"]))


def merge_experts(mix: str | Path, out: str | Path, *, overwrite: bool = False) -> MoEConfig:
    """Write the model with an expert of the dense FFN's size for each adapter and for the zero expert; its `moe` entry.

    Raises:
        UserError: no model with adapters; an output that cannot be written.
    """
    source, out = MixFolder.open(mix), Path(out)
    sizes, adapters = sizes_of(source.config), source.adapters
    if "attention" in adapters.blocks:
        raise UserError(
            f"{source.folder} has adapters of attention, which no expert of an FFN can hold; write them: --to peft"
        )
    moe = MoEConfig(
        num_frozen_experts=0, num_trainable_experts=adapters.num_experts, moe_intermediate_size=sizes.F,
        num_experts_per_tok=adapters.num_experts_per_tok, moe_layers=adapters.layers, routing="flat", gate="softmax",
        norm_topk_prob=True, route_scale=1.0,
    )  # fmt: skip
    tensors = []
    for name, tensor in source.tensors.items():
        prefix, layer = _place(name)
        if layer not in adapters.layers or ".mlp." not in name:
            tensors.append(OutputTensor(name, tensor.dtype, tensor.shape, Stretches.copy(tensor)))
        elif name == Place(layer, "down_proj").path + ".weight":
            pieces = _merged(source.tensors, prefix)
            for own, shape in moe_tensors(sizes.D, moe).items():
                dtype = "F32" if own == SELECTION_BIAS else tensor.dtype
                tensors.append(OutputTensor(prefix + own, dtype, shape, pieces[own]))
    family = converted_family(source.config)
    plan = WritePlan(tensors, converted_config(dense_config(source.config), family, moe=moe.to_dict()))
    check_output(out, overwrite, plan.total_bytes, {tensor.path for tensor in source.tensors.values()})
    with appearing_folder(out) as folder:
        copy_sidecars(source.folder, folder)
        write_tensors(plan, folder)
        write_json(folder / "config.json", plan.config)
        write_remote_code(folder, family)
    return moe


def _place(name: str) -> tuple[str, int]:
    """(prefix of the layer's FFN, number of the layer) of a tensor; ("", -1) outside of layers."""
    parts = name.split(".")
    if parts[:2] != ["model", "layers"]:
        return "", -1
    return IN_HF["mlp"].format(parts[2]), int(parts[2])


def _merged(tensors: dict[str, SourceTensor], prefix: str) -> dict[str, Piece]:
    def matrices(*modules: str) -> MergedExperts:
        return MergedExperts(
            tuple(
                (
                    tensors[f"{prefix}{module}.weight"],
                    tensors[prefix + lora_tensor(module, "a")],
                    tensors[prefix + lora_tensor(module, "b")],
                )
                for module in modules
            )
        )

    return {
        expert_name("trainable", GATE_UP): matrices("gate_proj", "up_proj"),
        expert_name("trainable", DOWN): matrices("down_proj"),
        ROUTER: Stretches.copy(tensors[prefix + ROUTER]),
        SELECTION_BIAS: Stretches.copy(tensors[prefix + SELECTION_BIAS]),
    }


@dataclass(frozen=True)
class MergedExperts:
    """W + B A of each adapter, then W itself, of one matrix or of two, one upon the other: [E, out, in]."""

    matrices: tuple[tuple[SourceTensor, SourceTensor, SourceTensor], ...]
    """(W [out, in], A [N, r, in], B [N, out, r])"""

    def write(self, sink: Sink, dtype: torch.dtype) -> None:
        """See `lamella.checkpoint.pieces.Piece`."""
        read = [[_whole(tensor) for tensor in matrix] for matrix in self.matrices]
        for expert in range(read[0][1].shape[0] + 1):
            for (dense, a, b), (source, _, _) in zip(read, self.matrices, strict=True):
                whole = dense if expert == len(a) else dense + b[expert] @ a[expert]
                sink.append(checked(whole.to(dtype), whole, source.name).flatten())


def _whole(tensor: SourceTensor) -> Tensor:
    return tensor.read(0, tensor.numel).view(tensor.shape).float()


def write_peft_adapters(mix: str | Path, out: str | Path, *, overwrite: bool = False) -> list[str]:
    """Write each adapter as a folder of its own that the library peft loads, and the routers in one file; their names.

    Raises:
        UserError: no model with adapters; an output that is there.
    """
    source, out = MixFolder.open(mix), Path(out)
    check_output(out, overwrite)
    manifest = source.folder / MANIFEST
    base = str(json.loads(manifest.read_text())["source"]["model"]) if manifest.is_file() else ""
    with appearing_folder(out) as folder:
        for index, name in enumerate(source.adapters.names):
            tensors = {}
            modules = [module for block in source.adapters.blocks for module in MODULES[block]]
            for place in (Place(layer, module) for layer in source.adapters.layers for module in modules):
                for half in ("a", "b"):
                    prefix = ADAPTERS_IN_HF[place.block].format(place.layer)
                    stored = source.tensors[prefix + lora_tensor(place.module, half)]
                    size = math.prod(stored.shape[1:])
                    matrix = stored.read(index * size, size).view(stored.shape[1:]).clone()
                    tensors[tensor_name(place, half)] = matrix
            own = folder / Path(name).name
            own.mkdir()
            save_file(tensors, own / WEIGHTS, metadata={"format": "pt"})
            rank = source.adapters.rank  # the scale is in B
            write_json(own / CONFIG, lora_config(base, rank, rank, source.adapters.layers, source.adapters.blocks))
        routers = {n: _whole(t) for n, t in source.tensors.items() if n.endswith((ROUTER, SELECTION_BIAS))}
        save_file(routers, folder / "routers.safetensors", metadata={"format": "pt"})
    return list(source.adapters.names)
