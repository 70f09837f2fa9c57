"""Experts of two matrices, as GPT-2's and OPT's FFNs are: expert_e(x) = down_e act(up_e x + up_bias_e).

    y_t = sum over k of weight_tk * expert_e(x_t),  e = expert_ids_tk

The dense FFN's second bias belongs to no expert: it is the layer's `output_bias`. One computation, one expert after
another under autograd; the faster paths of `lamella.moe.paths.choose` are for gated experts.

Shapes: T tokens, D model width, E experts, f neurons per expert, K active experts, N = T*K routed rows, n rows of one
expert or neurons of the shared one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.routing import Routing


class TwoMatrixExperts(NamedTuple):
    """Packed experts: E of them."""

    up_proj: Tensor
    """[E, f, D]"""
    up_bias: Tensor
    """[E, f]"""
    down_proj: Tensor
    """[E, D, f]"""


class TwoMatrixShared(NamedTuple):
    """An expert that every token passes."""

    up_proj: Tensor
    """[n, D]"""
    up_bias: Tensor
    """[n]"""
    down_proj: Tensor
    """[D, n]"""


def two_matrix_ffn(x_nD: Tensor, up_fD: Tensor, up_bias_f: Tensor, down_Df: Tensor, activation: Activation) -> Tensor:
    """One expert on its rows: down act(up x + up_bias), [n, D] -> [n, D]."""
    return F.linear(ACTIVATIONS[activation](F.linear(x_nD, up_fD, up_bias_f)), down_Df)


def two_matrix_path(
    x_TD: Tensor, routing: Routing, frozen: TwoMatrixExperts, trainable: TwoMatrixExperts, activation: Activation
) -> Tensor:
    """The weighted sum [T, D] of the outputs of each token's experts."""
    ids_N = routing.expert_ids_TK.flatten()
    order_N = ids_N.argsort(stable=True)
    token_N = order_N.div(routing.expert_ids_TK.shape[1], rounding_mode="floor")
    weights_N1 = routing.weights_TK.to(x_TD.dtype).flatten()[order_N, None]
    # unbound once: the gradients of all experts are then stacked once
    packed = [f.unbind(0) + t.unbind(0) for f, t in zip(frozen, trainable, strict=True)]
    y_TD = torch.zeros_like(x_TD)
    for e, span in _spans(torch.bincount(ids_N).tolist()):
        token_n = token_N[span]
        up_fD, up_bias_f, down_Df = (part[e] for part in packed)
        y_nD = two_matrix_ffn(x_TD[token_n], up_fD, up_bias_f, down_Df, activation)
        y_TD.index_add_(0, token_n, y_nD * weights_N1[span])
    return y_TD


def _spans(counts_E: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its place in the sorted rows) of the experts that have rows."""
    start = 0
    for e, count in enumerate(counts_E):
        if count:
            yield e, slice(start, start + count)
        start += count
