"""Gated experts packed into two tensors, so that all of them are one batched or grouped matrix product.

Shapes: E experts, D model width, f neurons per expert.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Experts(NamedTuple):
    """Packed experts: E of them, each a gated FFN of f neurons."""

    gate_up_proj: Tensor
    """[E, 2f, D]: the f gate rows of an expert, then its f up rows."""
    down_proj: Tensor
    """[E, D, f]"""
