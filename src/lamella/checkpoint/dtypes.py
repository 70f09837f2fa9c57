"""torch's side of the dtypes that weights are stored in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# safetensors' code -> torch dtype, the keys of `lamella.checkpoint.tensors.STORED_BYTES`.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}


def as_tensor(raw: np.ndarray, code: str) -> Tensor:
    """Bytes of a file as the elements that they are, without a copy."""
    return torch.from_numpy(raw).view(DTYPES[code])
