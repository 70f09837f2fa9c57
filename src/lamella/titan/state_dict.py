"""torchtitan's door to transformers checkpoints, over the one name map.

Tensors of packed experts have three dimensions in a file, [experts, rows, columns], and two here, [experts * rows,
columns]: the same numbers in the same order.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner, ReadItem
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from lamella.architecture import names
from lamella.architecture.moe_tensors import is_expert, is_lora
from lamella.titan.config import read_hf_config


class LamellaStateDictAdapter(StateDictAdapter):
    """Renames only; a tied head is in neither form, and low-rank deltas that begin with the run are not in the file.

    Packed experts keep their two dimensions: `RowsReader` reads them so.
    """

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in a checkpoint of transformers."""
        moe = read_hf_config(str(self.hf_assets_path)).moe
        if moe is None or not moe.lora_rank:
            state_dict = {name: tensor for name, tensor in state_dict.items() if not is_lora(name)}
        return names.to_hf(state_dict)

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in this home."""
        return names.from_hf(hf_state_dict)

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        """A reader of the model's folder, whose weights are not quantised."""
        return RowsReader(path)


class RowsReader(HuggingFaceStorageReader):
    """Reads a folder of safetensors files as if packed experts were matrices there, too."""

    def read_metadata(self) -> Metadata:
        """What the files hold, packed experts with two dimensions."""
        metadata = super().read_metadata()
        self.packed: dict[str, tuple[int, int, int]] = {}
        """The shapes in the file."""
        for name, entry in metadata.state_dict_metadata.items():
            if is_expert(name) and isinstance(entry, TensorStorageMetadata) and len(entry.size) == 3:
                E, rows, columns = entry.size
                self.packed[name] = (E, rows, columns)
                size = torch.Size((E * rows, columns))
                whole = ChunkStorageMetadata(offsets=torch.Size((0, 0)), sizes=size)
                metadata.state_dict_metadata[name] = replace(entry, size=size, chunks=[whole])
                place = metadata.storage_data.pop(MetadataIndex(name, torch.Size((0, 0, 0))))
                metadata.storage_data[MetadataIndex(name, torch.Size((0, 0)))] = place
        return metadata

    def _process_read_request(self, f: safe_open, req: ReadItem, planner: LoadPlanner) -> None:
        name = req.storage_index.fqn
        if name not in self.packed:
            super()._process_read_request(f, req, planner)
            return
        _, rows, columns = self.packed[name]
        (first, _), (count, width) = req.storage_offsets, req.lengths
        assert width == columns, "packed experts are cut by rows"
        experts = slice(first // rows, math.ceil((first + count) / rows))
        values = f.get_slice(name)[experts].reshape(-1, columns)
        start = first - experts.start * rows
        target = planner.resolve_tensor(req).detach()
        target.copy_(values[start : start + count])
        planner.commit_tensor(req, target)


def rows_of_experts(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Plain tensors as a file has them, packed experts made matrices."""
    return {name: t.flatten(0, 1) if is_expert(name) and t.dim() == 3 else t for name, t in state_dict.items()}
