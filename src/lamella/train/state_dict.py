"""torchtitan's door to transformers checkpoints, over the one name map."""

from __future__ import annotations

from typing import Any

import lamella.models.titan_device  # noqa: F401  first

# isort: split
from torchtitan.protocols.state_dict_adapter import StateDictAdapter

from lamella.models import names


class LamellaStateDictAdapter(StateDictAdapter):
    """Renames only; a tied head is in neither form."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return names.to_hf(state_dict)

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return names.from_hf(hf_state_dict)
