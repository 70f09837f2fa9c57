"""torchtitan's door to transformers checkpoints, over the one name map."""

from __future__ import annotations

from torch import Tensor
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from lamella.architecture import names
from lamella.architecture.moe_tensors import is_lora
from lamella.titan.config import read_hf_config


class LamellaStateDictAdapter(StateDictAdapter):
    """Renames only; a tied head is in neither form, and low-rank deltas that begin with the run are not in the file."""

    def to_hf(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in a checkpoint of transformers."""
        moe = read_hf_config(str(self.hf_assets_path)).moe
        if moe is None or not moe.lora_rank:
            state_dict = {name: tensor for name, tensor in state_dict.items() if not is_lora(name)}
        return names.to_hf(state_dict)

    def from_hf(self, hf_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors by their names in this home."""
        return names.from_hf(hf_state_dict)
