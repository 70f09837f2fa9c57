"""What an autograd Function's context holds, for those that write their own backward pass."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.function import FunctionCtx


class Context(FunctionCtx):
    """torch's own context; a Function that keeps more says so in a subclass of its own."""

    saved_tensors: tuple[Tensor, ...]
    """What `save_for_backward` was given."""
    needs_input_grad: tuple[bool, ...]
    """Of each argument of `forward`."""
