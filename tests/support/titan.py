"""Tiny converted models in the torchtitan home."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from lamella.architecture.names import from_hf
from lamella.titan.config import decoder_config
from lamella.titan.decoder import LamellaDecoder
from lamella.titan.state_dict import rows_of_experts


def load_titan(folder: Path, attention: str = "sdpa") -> LamellaDecoder:
    """The torchtitan model of the folder, weights loaded, in evaluation mode."""
    with torch.device("meta"):
        model = decoder_config(folder, attention).build()
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights()
    model.load_state_dict(rows_of_experts(from_hf(load_file(folder / "model.safetensors"))), strict=False)
    assert not any(t.isnan().any() for t in [*model.parameters(), *model.buffers()])
    return model.eval()
