"""The `quack` path: grouped products of the package quack-kernels (CuTeDSL, Hopper and later; extra `lamella[hopper]`).

As the `grouped` path, but that a product reads its rows by their places: nothing is gathered into memory first. Their
products take rows of one expert after another (`cu_seqlens_m`, where each begins and the last ends), the places of the
rows of the first matrix (`A_idx`), and for sums over rows `cu_seqlens_k` (github.com/Dao-AILab/quack, gemm_interface).

Not run on a GPU yet: tests compare it with the loop where their reference functions, or a stand-in, compute the
products on a CPU.

Shapes: as in `grouped`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.errors import UserError
from lamella.moe.packed import Experts
from lamella.moe.paths.fused import HALF
from lamella.moe.paths.grouped import Half, Kind, Rows, by_products
from lamella.moe.paths.measured import PathFailed
from lamella.moe.routing import Routing

INSTALLED = importlib.util.find_spec("quack") is not None
LEAST_CAPABILITY = (9, 0)
Gemm = Callable[..., Tensor]


class QuackProducts:
    """The products of quack-kernels; see `lamella.moe.paths.grouped.Products`."""

    def __init__(self, gemm: Gemm):
        self._gemm = gemm

    def gather(self, x_TD: Tensor, half: Half) -> Rows:
        """By their places."""
        return Rows(x_TD, half.token_N.int())

    def product(self, rows_Nm: Rows, matrices_Emn: Tensor, half: Half) -> Tensor:
        """Each row times its expert's matrix, [N, n]."""
        return self._gemm(rows_Nm.values, matrices_Emn, cu_seqlens_m=_bounds(half), A_idx=rows_Nm.token_N, tuned=False)

    def outer(self, left_Nm: Rows, right_Nn: Rows, half: Half) -> Tensor:
        """The sum over each expert's rows of left^T right, [E, m, n]. Only the first matrix is read by places: where
        that is the right one, its transpose comes first and fills the result transposed."""
        bounds = _bounds(half)
        if right_Nn.token_N is None:
            left, right = left_Nm, right_Nn.values
            return self._gemm(left.values.t(), right, cu_seqlens_k=bounds, A_idx=left.token_N, tuned=False)
        left, right = right_Nn, left_Nm.values
        shape = (len(half.ends_E), right.shape[1], left.values.shape[1])
        sum_Emn = left.values.new_empty(shape)
        self._gemm(left.values.t(), right, out=sum_Emn.mT, cu_seqlens_k=bounds, A_idx=left.token_N, tuned=False)
        return sum_Emn


def _bounds(half: Half) -> Tensor:
    """Where each expert's rows begin, and the last ones end: int32, [E + 1]."""
    return F.pad(half.ends_E, (1, 0))


def quack_fits(x_TD: Tensor, experts: Experts) -> bool:
    """Whether quack-kernels is installed, and the layer in half precision on a GPU that it is made for."""
    if not INSTALLED or x_TD.device.type != "cuda" or x_TD.dtype not in HALF:
        return False
    aligned = x_TD.shape[1] % 8 == 0 and experts.down_proj.shape[-1] % 8 == 0
    return aligned and torch.cuda.get_device_capability(x_TD.device) >= LEAST_CAPABILITY


def quack_path(
    x_TD: Tensor, routing: Routing, frozen: Experts, trainable: Experts, activation: Activation = "silu"
) -> Tensor:
    """The weighted sum [T, D] of the outputs of each token's experts; it waits for no host.

    Raises:
        UserError: quack-kernels is not installed, or the layer is nothing for it, see `quack_fits`.
        PathFailed: quack-kernels cannot be imported, or cannot compute this layer here.
    """
    if not quack_fits(x_TD, trainable if len(trainable.down_proj) else frozen):
        raise UserError(
            "the expert path 'quack' needs the package quack-kernels (pip install 'lamella[hopper]'), a GPU of the "
            "Hopper generation or later, and weights in bfloat16 or float16 whose widths are multiples of 8; use 'auto'"
        )
    return by_products(Kind(QuackProducts(_gemm()), activation), x_TD, routing, frozen, trainable)


def _gemm() -> Gemm:
    """quack's product; whatever it raises becomes a PathFailed, so that another path can be taken."""
    try:
        from quack.gemm_interface import gemm
    except Exception as error:  # its own dependencies may be missing or too new
        raise PathFailed(f"quack-kernels cannot be imported: {error}") from error

    def guarded(*arguments: Tensor, **options: Tensor | bool | None) -> Tensor:
        try:
            return gemm(*arguments, **options)
        except Exception as error:  # a compiler of kernels fails in many ways
            raise PathFailed(f"quack-kernels cannot compute this layer: {error}") from error

    return guarded
