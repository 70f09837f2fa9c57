"""Triton kernels for what is bound by memory: gather rows, activate and weigh, add up a token's rows.

Buffers may be longer than the rows in them: `count`, a value on the device, says how many there are, and programs
beyond it return at once, so that unused memory costs no traffic. Sums and activations are computed in float32.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N rows of a buffer.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.moe.paths.launch import on_device_of


@triton.jit
def _gather(x_ptr, token_ptr, count_ptr, out_ptr, D, BD: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    if n >= tl.load(count_ptr):
        return
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    token = tl.load(token_ptr + n)
    tl.store(out_ptr + n * D + d, tl.load(x_ptr + token * D + d, mask=d < D, other=0.0), mask=d < D)


@triton.jit
def _swiglu(gate_up_ptr, weight_ptr, count_ptr, hidden_ptr, f, BF: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    if n >= tl.load(count_ptr):
        return
    j = tl.program_id(1) * BF + tl.arange(0, BF)
    gate = tl.load(gate_up_ptr + n * 2 * f + j, mask=j < f, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + n * 2 * f + f + j, mask=j < f, other=0.0).to(tl.float32)
    hidden = gate * tl.sigmoid(gate) * up * tl.load(weight_ptr + n)
    tl.store(hidden_ptr + n * f + j, hidden.to(hidden_ptr.dtype.element_ty), mask=j < f)


@triton.jit
def _swiglu_gradient(
    dhidden_ptr, gate_up_ptr, weight_ptr, count_ptr, dgate_up_ptr, hidden_ptr, dweight_ptr, f, BF: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    if n >= tl.load(count_ptr):
        return
    weight = tl.load(weight_ptr + n)
    dtype = hidden_ptr.dtype.element_ty
    dweight = tl.zeros((BF,), tl.float32)
    for j0 in range(0, f, BF):
        j = j0 + tl.arange(0, BF)
        gate = tl.load(gate_up_ptr + n * 2 * f + j, mask=j < f, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + n * 2 * f + f + j, mask=j < f, other=0.0).to(tl.float32)
        dhidden = tl.load(dhidden_ptr + n * f + j, mask=j < f, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        dweight += dhidden * silu * up
        dhidden *= weight
        tl.store(hidden_ptr + n * f + j, (silu * up * weight).to(dtype), mask=j < f)
        dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(dgate_up_ptr + n * 2 * f + j, dgate.to(dtype), mask=j < f)
        tl.store(dgate_up_ptr + n * 2 * f + f + j, (dhidden * silu).to(dtype), mask=j < f)
    tl.store(dweight_ptr + n, tl.sum(dweight, 0))


@triton.jit
def _combine(a_ptr, b_ptr, count_ptr, slot_ptr, out_ptr, D, K: tl.constexpr, BD: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    count = tl.load(count_ptr)
    total = tl.zeros((BD,), tl.float32)
    for k in tl.static_range(K):
        slot = tl.load(slot_ptr + t * K + k)
        row_ptr = tl.where(slot < count, a_ptr + slot * D, b_ptr + (slot - count) * D)
        total += tl.load(row_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def _block(width: int) -> int:
    """Elements per program: 16 bytes for each of 128 threads, in bf16."""
    return min(1024, triton.next_power_of_2(width))


@torch.library.custom_op("lamella::gather_rows", mutates_args=())
def gather(x_TD: Tensor, token_N: Tensor, count: Tensor) -> Tensor:
    """The tokens of the first `count` rows, [N, D]; rows beyond them are undefined."""
    out_ND = _gathered(x_TD, token_N, count)
    D, BD = x_TD.shape[1], _block(x_TD.shape[1])
    with on_device_of(x_TD):
        _gather[(len(token_N), triton.cdiv(D, BD))](x_TD, token_N, count, out_ND, D, BD=BD)
    return out_ND


@gather.register_fake
def _gathered(x_TD, token_N, count):
    return x_TD.new_empty(len(token_N), x_TD.shape[1])


@torch.library.custom_op("lamella::swiglu", mutates_args=())
def swiglu(gate_up_N2f: Tensor, weights_N: Tensor, count: Tensor, activation: str = "silu") -> Tensor:
    """The weighted activations weight * silu(gate) * up [N, f] of the first `count` rows."""
    assert activation == "silu", "row_ops chooses"
    hidden_Nf = _activated(gate_up_N2f, weights_N, count)
    N, f = hidden_Nf.shape
    with on_device_of(gate_up_N2f):
        _swiglu[(N, triton.cdiv(f, _block(f)))](gate_up_N2f, weights_N, count, hidden_Nf, f, BF=_block(f))
    return hidden_Nf


@swiglu.register_fake
def _activated(gate_up_N2f, weights_N, count, activation="silu"):
    return gate_up_N2f.new_empty(len(gate_up_N2f), gate_up_N2f.shape[1] // 2)


@torch.library.custom_op("lamella::swiglu_gradient", mutates_args=())
def swiglu_gradient(
    dhidden_Nf: Tensor, gate_up_N2f: Tensor, weights_N: Tensor, count: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass through `swiglu`: (gradient of gate and up [N, 2f], weighted hidden rows [N, f], gradient of
    the weights [N]).
    """
    assert activation == "silu", "row_ops chooses"
    outputs = _gradients(dhidden_Nf, gate_up_N2f, weights_N, count)
    N, f = dhidden_Nf.shape
    with on_device_of(dhidden_Nf):
        _swiglu_gradient[(N,)](dhidden_Nf, gate_up_N2f, weights_N, count, *outputs, f, BF=_block(f))
    return outputs


@swiglu_gradient.register_fake
def _gradients(dhidden_Nf, gate_up_N2f, weights_N, count, activation="silu"):
    return torch.empty_like(gate_up_N2f), torch.empty_like(dhidden_Nf), torch.empty_like(weights_N)


@torch.library.custom_op("lamella::combine", mutates_args=())
def combine(a_ND: Tensor, b_ND: Tensor, count: Tensor, slot_TK: Tensor) -> Tensor:
    """The sum [T, D] of each token's rows; slots from `count` on are those of b."""
    out_TD = _combined(a_ND, b_ND, count, slot_TK)
    (T, D), BD = out_TD.shape, _block(a_ND.shape[1])
    with on_device_of(a_ND):
        _combine[(T, triton.cdiv(D, BD))](a_ND, b_ND, count, slot_TK, out_TD, D, K=slot_TK.shape[1], BD=BD)
    return out_TD


@combine.register_fake
def _combined(a_ND, b_ND, count, slot_TK):
    return a_ND.new_empty(len(slot_TK), a_ND.shape[1])
