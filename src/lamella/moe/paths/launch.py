"""Where Triton launches its kernels."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, Triton launches on the tensor's GPU.

    By itself it takes the current device, which is another one where a model is spread over several GPUs
    (`device_map="auto"`) or lies on "cuda:1": the kernel would read memory that is not there.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
