"""The Triton kernels as PyTorch operators: pure functions that eager mode, `torch.compile` and checkpointing share.

Each allocates its outputs, whose shapes follow from those of its inputs. An empty packed tensor (no frozen, or no
trainable experts) is never read.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, E experts of which S
frozen, R experts whose weights are wanted a gradient for.
"""

import torch
import triton
from torch import Tensor

from lamella.moe.paths import kernels
from lamella.moe.paths.launch import on_device_of


def _common(num_rows: int, ends_E: Tensor, width: int) -> dict:
    """Launch arguments that every grouped kernel takes. `width` is the length of the sums."""
    E = len(ends_E)
    mean_rows = max(1, num_rows // E)
    return {
        "E": E,
        "EP": triton.next_power_of_2(E),
        "ROWS": min(128, triton.next_power_of_2(mean_rows)),
        "EVEN": width % (16 if kernels.INTERPRETED else 64) == 0,
    }


def _grid(num_rows: int, num_experts: int, columns: int):
    """One program per tile, were the rows spread over the experts in the worst way."""
    return lambda meta: ((triton.cdiv(num_rows, meta["BM"]) + num_experts) * triton.cdiv(columns, meta["BN"]),)


@torch.library.custom_op("lamella::gate_up", mutates_args=())
def gate_up(
    x_TD: Tensor, weights_N: Tensor, token_N: Tensor, ends_E: Tensor, frozen_S2fD: Tensor, trainable: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """The two products before the activation: (weighted hidden rows [N, f], gate and up [N, 2f] or nothing [0, 2f])."""
    hidden_Nf, gate_up_N2f = _gate_up_outputs(x_TD, token_N, trainable, save)
    N, D, f = len(token_N), x_TD.shape[1], hidden_Nf.shape[1]
    with on_device_of(x_TD):
        kernels.gate_up_kernel[_grid(N, len(ends_E), f)](
            x_TD, token_N, weights_N, ends_E, frozen_S2fD, trainable, gate_up_N2f, hidden_Nf,
            N, D, f, len(frozen_S2fD), SAVE=save, **_common(N, ends_E, D),
        )  # fmt: skip
    return hidden_Nf, gate_up_N2f


def _gate_up_outputs(x_TD: Tensor, token_N: Tensor, packed: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    N, f = len(token_N), packed.shape[1] // 2
    return x_TD.new_empty(N, f), x_TD.new_empty(N if save else 0, 2 * f)


@gate_up.register_fake
def _(x_TD, weights_N, token_N, ends_E, frozen_S2fD, trainable, save):
    return _gate_up_outputs(x_TD, token_N, trainable, save)


@torch.library.custom_op("lamella::expert_rows", mutates_args=())
def expert_rows(a_NK: Tensor, ends_E: Tensor, frozen: Tensor, trainable: Tensor, transposed: bool) -> Tensor:
    """Each row times its expert's matrix [K, C], or [C, K] transposed: [N, C]."""
    (N, K), C = a_NK.shape, trainable.shape[1 if transposed else 2]
    out_NC = a_NK.new_empty(N, C)
    with on_device_of(a_NK):
        kernels.rows_kernel[_grid(N, len(ends_E), C)](
            a_NK, ends_E, frozen, trainable, out_NC,
            N, K, C, len(frozen), *((1, K) if transposed else (C, 1)), **_common(N, ends_E, K),
        )  # fmt: skip
    return out_NC


@expert_rows.register_fake
def _(a_NK, ends_E, frozen, trainable, transposed):
    return a_NK.new_empty(len(a_NK), trainable.shape[1 if transposed else 2])


@torch.library.custom_op("lamella::gate_up_gradient", mutates_args=())
def gate_up_gradient(
    dy_TD: Tensor, weights_N: Tensor, token_N: Tensor, ends_E: Tensor, frozen_SDf: Tensor, trainable: Tensor,
    gate_up_N2f: Tensor, first_trained: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward pass through `gate_up`.

    Returns:
        (gradient of gate and up [N, 2f], weighted hidden rows [N, f] of the experts from `first_trained` on,
        gradient of the gate weights [N]).
    """
    dgate_up_N2f, hidden_Nf, dweights_N = _gradient_outputs(weights_N, gate_up_N2f)
    N, D, f = len(token_N), dy_TD.shape[1], hidden_Nf.shape[1]
    partial_N = weights_N.new_empty(triton.cdiv(f, kernels.DW_COLUMNS), N)
    with on_device_of(dy_TD):
        kernels.dhidden_kernel[_grid(N, len(ends_E), f)](
            dy_TD, token_N, weights_N, ends_E, frozen_SDf, trainable, gate_up_N2f, dgate_up_N2f, hidden_Nf, partial_N,
            N, D, f, len(frozen_SDf), first_trained, **_common(N, ends_E, D),
        )  # fmt: skip
    return dgate_up_N2f, hidden_Nf, torch.sum(partial_N, 0, out=dweights_N)


def _gradient_outputs(weights_N: Tensor, gate_up_N2f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, f2 = gate_up_N2f.shape
    return torch.empty_like(gate_up_N2f), gate_up_N2f.new_empty(N, f2 // 2), torch.empty_like(weights_N)


@gate_up_gradient.register_fake
def _(dy_TD, weights_N, token_N, ends_E, frozen_SDf, trainable, gate_up_N2f, first_trained):
    return _gradient_outputs(weights_N, gate_up_N2f)


@torch.library.custom_op("lamella::weight_gradient", mutates_args=())
def weight_gradient(
    a: Tensor, b: Tensor, token_N: Tensor, ends_E: Tensor, first: int, count: int, gather_a: bool
) -> Tensor:
    """The gradients [R, A, B] of packed matrices: a_e^T b_e over the rows of the experts first .. first+count-1.

    `a` [., A] or else `b` [., B] has a row per token, the other one a row per routed row.
    """
    A, B = a.shape[1], b.shape[1]
    out = a.new_empty(count, A, B)
    with on_device_of(a):
        kernels.weight_gradient_kernel[lambda meta: (triton.cdiv(A, meta["BM"]) * triton.cdiv(B, meta["BN"]), count)](
            a, b, token_N, ends_E, out, A, B, first, GATHER_A=gather_a
        )
    return out


@weight_gradient.register_fake
def _(a, b, token_N, ends_E, first, count, gather_a):
    return a.new_empty(count, a.shape[1], b.shape[1])
