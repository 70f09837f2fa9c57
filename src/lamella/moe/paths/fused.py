"""The `fused` path: Triton grouped matrix products that gather, weigh and activate on the way (see `kernels`).

    forward:   hidden = w silu(gate x) (up x)            y = sum over k of down hidden
    backward:  d(gate, up), dw from dy down              dx = sum over k of [dgate, dup] [gate; up]
               dgate_up = [dgate, dup]^T x               ddown = dy^T hidden            for weights that train

No host synchronisation, no copy of any weight, no gradient of a frozen one. Kept for the backward pass: x and the gate
and up activations [N, 2f], half of what a dense FFN keeps under autograd.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.errors import UserError
from lamella.moe.autograd import Context
from lamella.moe.packed import Experts
from lamella.moe.paths.dispatch import Dispatch, dispatch, to_rows
from lamella.moe.paths.row_ops import runs_triton
from lamella.moe.routing import Routing

HALF = (torch.bfloat16, torch.float16)


def fused_fits(x_TD: Tensor, experts: Experts, activation: Activation = "silu") -> bool:
    """Whether the layer computes silu in half precision on a GPU with Triton, its rows at multiples of 16 bytes."""
    aligned = x_TD.shape[1] % 8 == 0 and experts.down_proj.shape[-1] % 8 == 0
    return activation == "silu" and runs_triton(x_TD.device) and x_TD.dtype in HALF and aligned


def fused_path(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """The weighted sum [T, D] of the outputs of each token's experts; once differentiable.

    Raises:
        UserError: Triton is not installed, the tensors are not on a GPU, not in half precision, or not of one dtype, or
            the experts compute another activation than silu, which is all that the kernels know.
    """
    if activation != "silu":
        raise UserError(f"the expert path 'fused' computes silu, and these experts {activation!r}; use 'auto'")
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in (x_TD, *frozen, *trainable)})
    if len(dtypes) > 1:
        raise UserError(
            f"the expert path 'fused' computes in one dtype, and the layer's input and weights are of "
            f"{' and '.join(dtypes)}; cast them to one of these"
        )
    interpreted = x_TD.device.type == "cpu"  # by Triton, whatever the precision
    if not runs_triton(x_TD.device) or not (interpreted or x_TD.dtype in HALF):
        raise UserError("the expert path 'fused' needs a GPU, triton, and weights in bfloat16 or float16; use 'auto'")
    packed = [t.contiguous() for t in (*frozen, *trainable)]
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, routing.weights_TK, *packed))
    return _Fused.apply(x_TD.contiguous(), routing.weights_TK, routing.expert_ids_TK, saves, *packed)


class FusedContext(Context):
    """What the forward pass keeps besides tensors."""

    weights_dtype: torch.dtype


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FusedContext, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor, saves: bool,
        frozen_gate_up: Tensor, frozen_down: Tensor, trainable_gate_up: Tensor, trainable_down: Tensor,
    ) -> Tensor:  # fmt: skip
        from lamella.moe.paths import fused_ops as ops
        from lamella.moe.paths import row_kernels as row_ops

        d = dispatch(expert_ids_TK, len(frozen_down) + len(trainable_down))
        weights_N = to_rows(weights_TK.float(), d)
        hidden_Nf, gate_up_N2f = ops.gate_up(
            x_TD, weights_N, d.token_N, d.ends_E, frozen_gate_up, trainable_gate_up, saves
        )
        y_ND = ops.expert_rows(hidden_Nf, d.ends_E, frozen_down, trainable_down, True)
        packed = (frozen_gate_up, frozen_down, trainable_gate_up, trainable_down)
        ctx.save_for_backward(x_TD, weights_N, *d, gate_up_N2f, *packed)
        ctx.weights_dtype = weights_TK.dtype
        return row_ops.combine(y_ND, y_ND, d.ends_E[-1:], d.slot_TK)

    @staticmethod
    def backward(ctx: FusedContext, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        from lamella.moe.paths import fused_ops as ops
        from lamella.moe.paths import row_kernels as row_ops

        x_TD, weights_N, *saved, gate_up_N2f, frozen_gate_up, frozen_down, trainable_gate_up, trainable_down = (
            ctx.saved_tensors
        )
        d, S, R = Dispatch(*saved), len(frozen_down), len(trainable_down)
        dy_TD = dy_TD.contiguous()
        needs, kinds = ctx.needs_input_grad[4:], ((0, S), (S, R))
        dgate_up_N2f, hidden_Nf, dweights_N = ops.gate_up_gradient(
            dy_TD, weights_N, d.token_N, d.ends_E, frozen_down, trainable_down, gate_up_N2f, 0 if needs[1] else S
        )
        grads: list[Tensor | None] = [None] * 4
        for i, (first, count) in enumerate(kinds):
            if count and needs[2 * i + 1]:
                grads[2 * i + 1] = ops.weight_gradient(dy_TD, hidden_Nf, d.token_N, d.ends_E, first, count, True)
        del hidden_Nf
        for i, (first, count) in enumerate(kinds):
            if count and needs[2 * i]:
                grads[2 * i] = ops.weight_gradient(dgate_up_N2f, x_TD, d.token_N, d.ends_E, first, count, False)
        dx_TD = None
        if ctx.needs_input_grad[0]:
            dx_ND = ops.expert_rows(dgate_up_N2f, d.ends_E, frozen_gate_up, trainable_gate_up, False)
            dx_TD = row_ops.combine(dx_ND, dx_ND, d.ends_E[-1:], d.slot_TK)
        return dx_TD, dweights_N[d.slot_TK].to(ctx.weights_dtype), None, None, *grads
