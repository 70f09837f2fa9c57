"""The path that `auto` stands for, chosen before a layer is compiled: in a graph nothing can be measured.

Shapes: T tokens, D model width, f neurons per expert, K active experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lamella.architecture.moe import ExpertPath
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import PATHS, fitting_paths
from lamella.moe.paths.measured import fastest
from lamella.moe.routing import Routing


@torch.enable_grad()
def path_ahead(
    tokens: int, D: int, f: int, frozen: int, trainable: int, top_k: int, dtype: torch.dtype, device: torch.device,
    allowed: Sequence[ExpertPath],
) -> ExpertPath:  # fmt: skip
    """The fastest path that fits, measured once per shape on drawn tensors and kept on disk.

    Args:
        allowed: the paths that can be compiled; where none of them fits, the best guess of the others is given.
        tokens: T, that the experts are given at once.
        frozen: the number of frozen experts here; trainable: of those that train.
    """

    def drawn(*shape: int, requires_grad: bool = False) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02).requires_grad_(requires_grad)

    still = Experts(drawn(frozen, 2 * f, D), drawn(frozen, D, f))
    moving = Experts(drawn(trainable, 2 * f, D, requires_grad=True), drawn(trainable, D, f, requires_grad=True))
    x_TD = drawn(tokens, D, requires_grad=True)
    ids_TK = torch.arange(top_k, device=device).expand(tokens, top_k)
    routing = Routing(ids_TK, torch.ones(ids_TK.shape, device=device))
    fitting = fitting_paths(x_TD, moving if trainable else still)
    names = [name for name in fitting if name in allowed] or fitting[:1]
    return fastest(x_TD, routing, still, moving, {name: PATHS[name] for name in names})
