"""What quack-kernels' `gemm` computes of rows of several lengths, on a CPU, by one torch product a group.

Written from the meaning that its arguments have there. Stricter than its kernels: rows of no group become NaN, so that
reading them shows, and layouts that its kernels refuse are refused.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, *, cu_seqlens_m: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, A_idx: Tensor | None = None, tuned: bool = True,
) -> Tensor:  # fmt: skip
    """Rows of A (places `A_idx`) times the group's matrix of B; with `cu_seqlens_k` the sums over a group's columns."""
    for tensor in (A, B, *([] if out is None else [out])):
        assert 1 in tensor.stride()[-2:], "one of the last two dimensions must be contiguous"
    assert A_idx is None or A_idx.dtype == torch.int32
    bounds = cu_seqlens_m if cu_seqlens_k is None else cu_seqlens_k
    assert bounds is not None
    assert bounds.dtype == torch.int32
    groups = list(zip(bounds.tolist(), bounds.tolist()[1:], strict=False))
    if cu_seqlens_m is not None:
        places = torch.arange(len(A)) if A_idx is None else A_idx
        made = A.new_full((len(places), B.shape[-1]), float("nan"))
        for i, (begin, end) in enumerate(groups):
            made[begin:end] = A[places[begin:end]] @ B[i]
    else:
        places = torch.arange(A.shape[1]) if A_idx is None else A_idx
        made = torch.stack([A[:, places[begin:end]] @ B[begin:end] for begin, end in groups])
    if out is None:
        return made
    assert out.shape == made.shape
    return out.copy_(made)
