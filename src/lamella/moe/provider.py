"""Where the experts of a layer come from: all in memory, or handed out by whoever keeps them (a disk, main memory).

A layer asks its provider for the experts that its tokens chose, and computes each portion it is given before it asks
for the next one. So a provider may keep fewer experts in memory than there are, read ahead while a portion is being
computed, and use the memory of a portion again for the next.

Shapes: T tokens, D model width, E experts of the layer (frozen ones first, then trainable), K active experts, N rows
of one portion, n experts of one portion.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.packed import Experts
from lamella.moe.routing import Routing
from lamella.moe.routing_one import Chosen
from lamella.moe.two_matrix import TwoMatrixExperts

AnyExperts: TypeAlias = Experts | TwoMatrixExperts


def none_of(experts: AnyExperts) -> AnyExperts:
    """No experts, [0, ...], of the kind and the widths of these."""
    return type(experts)._make(tensor[:0] for tensor in experts)


class Portion(NamedTuple):
    """Some experts of a layer, for as long as it takes to compute them."""

    ids: Sequence[int]
    """Which of the layer's E experts these are, in the order in which they are packed."""
    experts: AnyExperts
    """n packed experts, on the device and in the dtype of the layer's input."""


class ExpertProvider(Protocol):
    """Gives a layer its experts, portion by portion."""

    def hand_out(self, expert_ids: Sequence[int]) -> Iterator[Portion]:
        """The experts of these ids, each in exactly one portion, in any order.

        A portion may hold experts that were not asked for: they get no rows. Its tensors need to be what they are only
        until the next portion is asked for.

        Args:
            expert_ids: ascending, without repetition.
        """
        ...


class Resident(NamedTuple):
    """All experts of a layer, in memory: the provider of every path of `lamella.moe.paths`."""

    frozen: AnyExperts
    trainable: AnyExperts
    """Of the same kind as the frozen ones."""

    def hand_out(self, expert_ids: Sequence[int]) -> Iterator[Portion]:
        """Both packed tensors as they are: nothing is gathered."""
        S = len(self.frozen.down_proj)
        for first, part in ((0, self.frozen), (S, self.trainable)):
            if len(part.down_proj):
                yield Portion(range(first, first + len(part.down_proj)), part)


class ExpertComputer(ABC):
    """Experts that compute their own outputs, in a form that no path of `lamella.moe.paths` takes."""

    @abstractmethod
    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """The weighted sum [T, D] of each token's experts, for inference."""

    @abstractmethod
    def add_one(self, y_D: Tensor, x_D: Tensor, chosen: Chosen, activation: Activation = "silu") -> None:
        """Add the weighted sum of one token's experts to `y_D`, on a CPU."""


def experts_in_portions(
    x_TD: Tensor,
    routing: Routing,
    provider: ExpertProvider,
    compute: Callable[[Tensor, Routing, AnyExperts], Tensor],
) -> Tensor:
    """The sum [T, D] of the chosen experts' weighted outputs, whatever portions the experts come in.

    It asks the device which experts were chosen, so it waits for it once.

    Args:
        compute: of rows [N, D], their routing [N, 1] (for a single token [1, n]) to the experts of one portion, and
            these experts, the weighted sum per row [N, D].
    """
    y_TD = torch.zeros_like(x_TD)
    for portion in provider.hand_out(routing.expert_ids_TK.unique().tolist()):
        ids_n = torch.tensor(portion.ids, device=x_TD.device)
        token_N, k_N, local_N = torch.where(routing.expert_ids_TK[..., None] == ids_n)
        weights_N = routing.weights_TK[token_N, k_N]
        if len(x_TD) == 1:  # one token: the paths for decoding want its experts side by side
            y_TD = y_TD + compute(x_TD, Routing(local_N[None], weights_N[None]), portion.experts)
        elif len(token_N):
            y_ND = compute(x_TD[token_N], Routing(local_N[:, None], weights_N[:, None]), portion.experts)
            y_TD = y_TD.index_add(0, token_N, y_ND)
    return y_TD
