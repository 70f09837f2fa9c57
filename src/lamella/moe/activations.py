"""What an FFN computes between its matrices: a function of each number alone, and its derivative.

Names are transformers'. Because it is elementwise, an FFN may be cut along its neurons whatever it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import Activation

Function = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's approximation, by tanh. Step by step as transformers has it: in bf16 `F.gelu` rounds otherwise."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


_gelu_tanh_backward: Backward = partial(torch.ops.aten.gelu_backward, approximate="tanh")
ACTIVATIONS: dict[Activation, Function] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_BACKWARD: dict[Activation, Backward] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_new": _gelu_tanh_backward,
    "gelu_pytorch_tanh": _gelu_tanh_backward,
    "relu": lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
}


def activation_gradient(activation: Activation, gradient: Tensor, x: Tensor) -> Tensor:
    """The gradient with respect to x, given that with respect to the activation of x."""
    return _BACKWARD[activation](gradient, x)


def activate_into(activation: Activation, x: Tensor, out: Tensor) -> None:
    """Write the activation of x into `out`; silu without a copy of its own."""
    if activation == "silu":
        torch.ops.aten.silu.out(x, out=out)
    else:
        out.copy_(ACTIVATIONS[activation](x))


def activation_gradient_into(activation: Activation, gradient: Tensor, x: Tensor, out: Tensor) -> None:
    """Write `activation_gradient` into `out`; silu's without a copy of its own."""
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out)
    else:
        out.copy_(activation_gradient(activation, gradient, x))
