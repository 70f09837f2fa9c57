"""Triton kernels of the `fused` path; `lamella.moe.paths.fused` launches them.

A program computes one tile of rows of one expert. Rows are sorted by expert; which expert and which rows a tile has
follows from `ends_E` inside the kernel, so that the launch needs nothing from the device, and the weights are read
through one of two pointers, frozen or trainable, so that they need not lie in one tensor. There are as many programs
as the worst load could need; those without rows return at once.

Rows of x and dy are gathered while they are loaded, and the elementwise work is done on the accumulators: no permuted
copy of the input and no unweighted hidden rows go through memory.

Shapes: T tokens, D model width, f neurons per expert, K active experts, N = T*K routed rows, E experts of which S
frozen. Tiles: BM rows, BN columns, BK along the sum.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WIDEN = tl.constexpr(INTERPRETED)  # the interpreter multiplies no bf16
DW_COLUMNS = 16 if INTERPRETED else 128
"""Columns per tile of the hidden gradient: fixed, for the gate weights' gradient has a partial sum per such tile."""


def _configs(tiles: list[tuple[int, int, int, int, int]]) -> list[triton.Config]:
    """Candidates (BM, BN, BK, stages, warps) for the autotuner, which the interpreter does without. It drops those that
    need more shared memory than there is; one in each list needs under 100 KB."""
    if INTERPRETED:
        return [triton.Config({"BM": 32, "BN": 16, "BK": 16, "GROUP": 2})]
    return [
        triton.Config({"BM": bm, "BN": bn, "BK": bk, "GROUP": 8}, num_stages=stages, num_warps=warps)
        for bm, bn, bk, stages, warps in tiles
    ]


def _fitting(configs: list[triton.Config], args: dict[str, object], *, ROWS: int, **_: object) -> list[triton.Config]:
    """Tiles no taller than the rows that an expert has on average, but for the smallest."""
    least = min(c.kwargs["BM"] for c in configs)
    return [c for c in configs if least < c.kwargs["BM"] <= ROWS or (c.kwargs["BM"] == least and ROWS < 64)] or configs


@triton.jit
def _tile(group_size, num_m, num_n):
    """(row tile, column tile) of this program: `group_size` row tiles share each column tile while it is in cache."""
    pid = tl.program_id(0)
    per_group = group_size * num_n
    first_m = pid // per_group * group_size
    size = tl.minimum(num_m - first_m, group_size)
    return first_m + pid % per_group % size, pid % per_group // size


@triton.jit
def _expert_rows(tile_m, ends_ptr, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile; expert >= E past the last tile."""
    e = tl.arange(0, EP)
    ends = tl.load(ends_ptr + e, mask=e < E, other=0)
    starts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (ends - starts + BM - 1) // BM
    tile_ends = tl.cumsum(tl.where(e < E, tiles, 0), 0)
    expert = tl.sum((tile_ends <= tile_m).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, starts + (tile_m - tile_ends + tiles) * BM, 0), 0)
    return expert, first, tl.sum(tl.where(mine, ends, 0), 0)


@triton.jit
def _weights(expert, frozen_ptr, trainable_ptr, S, size):
    """The expert's matrix; `size` elements each."""
    # no method of S: where it is 1, Triton passes it as a constant
    frozen = frozen_ptr + expert.to(tl.int64) * size
    return tl.where(expert < S, frozen, trainable_ptr + (expert - S).to(tl.int64) * size)


@triton.jit
def _rows_at(ptr, first, width, BM: tl.constexpr):
    """[BM, 1] pointers to the rows from `first` on. The 64-bit part is a scalar: per element it costs registers."""
    return ptr + first.to(tl.int64) * width + (tl.arange(0, BM) * width)[:, None]


@triton.jit
def _load(ptrs, k, K, dim: tl.constexpr, EVEN: tl.constexpr):
    """A tile whose dimension `dim` runs along the sum, zero from K on."""
    if EVEN:
        tile = tl.load(ptrs)
    elif dim == 0:
        tile = tl.load(ptrs, mask=k[:, None] < K, other=0.0)
    else:
        tile = tl.load(ptrs, mask=k[None, :] < K, other=0.0)
    return tile


@triton.jit
def _dot(a, b, total):
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.autotune(
    _configs(
        [
            (128, 128, 64, 3, 8),
            (128, 64, 64, 4, 8),
            (128, 64, 64, 4, 4),
            (64, 128, 64, 4, 4),
            (64, 64, 64, 3, 4),
            (16, 64, 64, 4, 4),
        ]
    ),
    key=["D", "f", "ROWS", "SAVE"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def gate_up_kernel(
    x_ptr, token_ptr, weight_ptr, ends_ptr, frozen_ptr, trainable_ptr, gate_up_ptr, hidden_ptr,
    N, D, f, S, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """hidden = silu(x gate^T) * (x up^T) * weight [N, f]; gate and up [N, 2f] if they are saved."""
    tile_m, tile_n = _tile(GROUP, tl.cdiv(N, BM) + E, tl.cdiv(f, BN))
    expert, first, end = _expert_rows(tile_m, ends_ptr, E, EP, BM)
    if expert >= E:
        return
    row = first + tl.arange(0, BM)
    col = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    token = tl.load(token_ptr + row, mask=row < end, other=0)
    a_ptrs = x_ptr + token[:, None] * D + k[None, :]
    weights = _weights(expert, frozen_ptr, trainable_ptr, S, 2 * f * D)
    gate_ptrs = weights + (col % f)[None, :] * D + k[:, None]
    up_ptrs = gate_ptrs + f * D
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        a = _load(a_ptrs, k0 + k, D, 1, EVEN)
        gate = _dot(a, _load(gate_ptrs, k0 + k, D, 0, EVEN), gate)
        up = _dot(a, _load(up_ptrs, k0 + k, D, 0, EVEN), up)
        a_ptrs += BK
        gate_ptrs += BK
        up_ptrs += BK
    mask = (row < end)[:, None] & (col < f)[None, :]
    dtype = hidden_ptr.dtype.element_ty
    if SAVE:
        saved_ptrs = _rows_at(gate_up_ptr, first, 2 * f, BM) + col[None, :]
        tl.store(saved_ptrs, gate.to(dtype), mask=mask)
        tl.store(saved_ptrs + f, up.to(dtype), mask=mask)
    weight = tl.load(weight_ptr + row, mask=row < end, other=0.0)
    hidden = gate * tl.sigmoid(gate) * up * weight[:, None]
    tl.store(_rows_at(hidden_ptr, first, f, BM) + col[None, :], hidden.to(dtype), mask=mask)


@triton.autotune(
    _configs(
        [
            (128, 256, 64, 3, 8),
            (128, 128, 64, 4, 8),
            (128, 128, 64, 4, 4),
            (64, 256, 64, 4, 8),
            (64, 128, 64, 3, 4),
            (16, 128, 64, 4, 4),
        ]
    ),
    key=["K", "C", "ROWS", "stride_k"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def rows_kernel(
    a_ptr, ends_ptr, frozen_ptr, trainable_ptr, out_ptr,
    N, K, C, S, stride_k, stride_c, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [N, C] = a [N, K] times the row's expert's matrix [K, C], of strides (stride_k, stride_c)."""
    tile_m, tile_n = _tile(GROUP, tl.cdiv(N, BM) + E, tl.cdiv(C, BN))
    expert, first, end = _expert_rows(tile_m, ends_ptr, E, EP, BM)
    if expert >= E:
        return
    row = first + tl.arange(0, BM)
    col = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    inside = tl.minimum(tl.arange(0, BM), end - 1 - first)
    a_ptrs = a_ptr + first.to(tl.int64) * K + (inside * K)[:, None] + k[None, :]
    weights = _weights(expert, frozen_ptr, trainable_ptr, S, K * C)
    b_ptrs = weights + (col % C)[None, :] * stride_c + k[:, None] * stride_k
    out = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        a = _load(a_ptrs, k0 + k, K, 1, EVEN)
        out = _dot(a, _load(b_ptrs, k0 + k, K, 0, EVEN), out)
        a_ptrs += BK
        b_ptrs += BK * stride_k
    mask = (row < end)[:, None] & (col < C)[None, :]
    out_ptrs = _rows_at(out_ptr, first, C, BM) + col[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hidden_gradient(
    dhidden, weight, col, first, end, trains, gate_up_ptr, dgate_up_ptr, hidden_ptr, f, BM: tl.constexpr
):  # fmt: skip
    """Stores what follows from a tile of the hidden gradient; returns the row sums of dhidden * hidden."""
    mask = (first + tl.arange(0, BM) < end)[:, None] & (col < f)[None, :]
    gate_ptrs = _rows_at(gate_up_ptr, first, 2 * f, BM) + col[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + f, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dweight = tl.sum(dhidden * silu * up, 1)
    dtype = dgate_up_ptr.dtype.element_ty
    if trains:
        hidden_ptrs = _rows_at(hidden_ptr, first, f, BM) + col[None, :]
        tl.store(hidden_ptrs, (silu * up * weight[:, None]).to(dtype), mask=mask)
    dhidden *= weight[:, None]
    dgate_ptrs = _rows_at(dgate_up_ptr, first, 2 * f, BM) + col[None, :]
    tl.store(dgate_ptrs, (dhidden * up * (sigmoid + silu * (1 - sigmoid))).to(dtype), mask=mask)
    tl.store(dgate_ptrs + f, (dhidden * silu).to(dtype), mask=mask)
    return dweight


@triton.autotune(
    _configs(
        [
            (128, DW_COLUMNS, 64, 4, 8),
            (128, DW_COLUMNS, 64, 3, 8),
            (64, DW_COLUMNS, 64, 4, 4),
            (16, DW_COLUMNS, 64, 4, 4),
        ]
    ),
    key=["D", "f", "ROWS"],
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit
def dhidden_kernel(
    dy_ptr, token_ptr, weight_ptr, ends_ptr, frozen_ptr, trainable_ptr, gate_up_ptr,
    dgate_up_ptr, hidden_ptr, dweight_ptr,
    N, D, f, S, first_trained, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """From dh = dy down: (dgate, dup) [N, 2f], the partial sums of dweight = <dh, h> [tiles of f, N] and, for the
    rows of the experts from `first_trained` on, weight * h [N, f]."""
    tile_m, tile_n = _tile(GROUP, tl.cdiv(N, BM) + E, tl.cdiv(f, BN))
    expert, first, end = _expert_rows(tile_m, ends_ptr, E, EP, BM)
    if expert >= E:
        return
    row = first + tl.arange(0, BM)
    col = tile_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    token = tl.load(token_ptr + row, mask=row < end, other=0)
    a_ptrs = dy_ptr + token[:, None] * D + k[None, :]
    b_ptrs = _weights(expert, frozen_ptr, trainable_ptr, S, D * f) + (col % f)[None, :] + k[:, None] * f
    dhidden = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, D, BK):
        a = _load(a_ptrs, k0 + k, D, 1, EVEN)
        dhidden = _dot(a, _load(b_ptrs, k0 + k, D, 0, EVEN), dhidden)
        a_ptrs += BK
        b_ptrs += BK * f
    # The epilogue needs five tiles at once: in halves they fit the registers.
    left, right = tl.split(tl.permute(tl.reshape(dhidden, (BM, 2, BN // 2)), (0, 2, 1)))
    weight = tl.load(weight_ptr + row, mask=row < end, other=0.0)
    trains = expert >= first_trained
    col = tile_n * BN + tl.arange(0, BN // 2)
    dweight = _hidden_gradient(left, weight, col, first, end, trains, gate_up_ptr, dgate_up_ptr, hidden_ptr, f, BM)
    col += BN // 2
    dweight += _hidden_gradient(right, weight, col, first, end, trains, gate_up_ptr, dgate_up_ptr, hidden_ptr, f, BM)
    tl.store(dweight_ptr + tile_n.to(tl.int64) * N + row, dweight, mask=row < end)


@triton.autotune(
    _configs(
        # two of the stages go to the row numbers, which are loaded before the rows
        [
            (128, 256, 64, 5, 8),
            (128, 256, 64, 4, 8),
            (128, 128, 64, 6, 8),
            (128, 128, 64, 6, 4),
            (256, 128, 64, 5, 8),
            (64, 128, 64, 4, 4),
        ]
    ),
    key=["A", "B", "GATHER_A"],
)
@triton.jit
def weight_gradient_kernel(
    a_ptr, b_ptr, token_ptr, ends_ptr, out_ptr,
    A, B, first_expert, GATHER_A: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out_e [A, B] = a_e^T b_e over the rows of expert first_expert + e; a or b has a row per token and is gathered."""
    tile_i, tile_j = _tile(GROUP, tl.cdiv(A, BM), tl.cdiv(B, BN))
    expert = first_expert + tl.program_id(1)
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    i = tile_i * BM + tl.arange(0, BM)
    j = tile_j * BN + tl.arange(0, BN)
    out = tl.zeros((BM, BN), tl.float32)
    for row0 in range(start, end, BK):
        row = row0 + tl.arange(0, BK)
        token = tl.load(token_ptr + row, mask=row < end, other=0)
        here = row.to(tl.int64)
        a_row = token if GATHER_A else here
        b_row = here if GATHER_A else token
        a = tl.load(a_ptr + a_row[None, :] * A + (i % A)[:, None], mask=(row < end)[None, :], other=0.0)
        b = tl.load(b_ptr + b_row[:, None] * B + (j % B)[None, :], mask=(row < end)[:, None], other=0.0)
        out = _dot(a, b, out)
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * A * B + i[:, None] * B + j[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(i < A)[:, None] & (j < B)[None, :])
