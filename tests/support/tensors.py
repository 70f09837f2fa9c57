"""The tensors of a folder, as the safetensors library reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, read by the safetensors library (not by the code under test)."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )
