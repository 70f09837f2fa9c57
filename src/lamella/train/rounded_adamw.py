"""AdamW whose moments are bfloat16, rounded stochastically: half of the memory and of a checkpoint's bytes.

A mean that moves by less than half of bfloat16's spacing (1/256 of the value) would stand still if it were rounded to
the nearest; rounded up or down by chance, in proportion to what lies between, it moves as much in the mean (arXiv
2010.06192).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lamella.jsons import Json

MOMENTS = ("exp_avg", "exp_avg_sq")
LOW_BITS = 16
"""float32 has so many more than bfloat16."""


def stochastically_rounded(x: Tensor, generator: torch.Generator) -> Tensor:
    """The float32 tensor in bfloat16: one of the two neighbours of each value, the nearer one more often, so that the
    mean over many roundings is the value.
    """
    noise = torch.randint(1 << LOW_BITS, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = (x.contiguous().view(torch.int32) + noise) & -(1 << LOW_BITS)
    return bits.view(torch.float32).to(torch.bfloat16)


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with weights in float32 and moments in bfloat16.

    What is drawn depends on the step and the parameter alone, and not on the rank: copies of a weight stay equal, and
    a run that was resumed goes on as it would have.
    """

    def __init__(
        self,
        params: Iterable[Json],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torchtitan gives none
        """Change every parameter that has a gradient."""
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    self._update(parameter, group, index)

    def _update(self, parameter: Tensor, group: Json, index: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(parameter, dtype=torch.bfloat16) for name in MOMENTS}
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"]), group["betas"]
        weights, gradient, mean, square = (
            _local(t) for t in (parameter, parameter.grad, *(state[name] for name in MOMENTS))
        )
        generator = torch.Generator(weights.device).manual_seed((step << 20) + index)
        gradient = gradient.float()
        new_mean = mean.float().lerp_(gradient, 1 - beta1)
        new_square = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean.copy_(stochastically_rounded(new_mean, generator))
        square.copy_(stochastically_rounded(new_square, generator))
        scale = new_square.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        weights.mul_(1 - group["lr"] * group["weight_decay"])
        weights.addcdiv_(new_mean, scale, value=-group["lr"] / (1 - beta1**step))

    def load_state_dict(self, state_dict: Json) -> None:
        """torch's own casts the moments to the dtype of the parameters."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state |= {name: state[name].to(torch.bfloat16) for name in MOMENTS if name in state}


def _local(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
