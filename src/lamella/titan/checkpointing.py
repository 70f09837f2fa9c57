"""Which activations the backward pass computes again, by torchtitan's policies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torchtitan.distributed.activation_checkpoint import ActivationCheckpointing, FullAC, SelectiveAC

from lamella.moe.paths.row_ops import HAS_TRITON
from lamella.titan.seams import GROUPED_PRODUCT


class Selective(SelectiveAC):
    """torchtitan's: outputs of attention and of every second matrix product are kept. Besides, the products of experts
    before their activation, which are two thirds of their work.

    What follows them, the activation and the product down, gives nothing that the backward pass reads: in a compiled
    block it is not computed again at all.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        """torchtitan's."""

        pass

    def get_save_ops(self) -> set[object]:
        """The operators whose outputs are kept."""
        return super().get_save_ops() | expert_products()


def expert_products() -> set[object]:
    """The operators of the expert paths that compute products before the activation."""
    found: set[object] = {GROUPED_PRODUCT}
    if HAS_TRITON:
        from lamella.moe.paths import fused_ops  # noqa: F401  registers them

        found.add(torch.ops.lamella.gate_up.default)
    return found


def policy(kind: str) -> ActivationCheckpointing.Config | None:
    """The config of torchtitan's policy; None keeps all activations.

    Args:
        kind: none, selective or full.
    """
    kinds = {"selective": Selective.Config, "full": FullAC.Config, "none": None}
    config = kinds[kind]
    return None if config is None else config()
