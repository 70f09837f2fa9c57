"""The experts of one layer, asked of the cache of all: what `lamella.moe.experts` computes with.

Shapes: T tokens, D model width, E experts (frozen ones first), K active experts, R router rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.activations import ACTIVATIONS
from lamella.moe.offload.cache import ExpertCache
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import apply_experts
from lamella.moe.provider import ExpertComputer, Portion, experts_in_portions, none_of
from lamella.moe.routing import Routing

Guess = Callable[[Tensor], list[int]]
"""Of the input [1, D] of a layer's experts, which experts the next layer will ask for."""


class OffloadedExperts(ExpertComputer):
    """Experts of layer `index`.

    Args:
        is_first: whether a token's way through the experts begins here.
        guess: of the next MoE layer, whose index is `next_index`; None: nothing is read ahead.
    """

    def __init__(self, index: int, cache: ExpertCache, is_first: bool, next_index: int = 0, guess: Guess | None = None):
        self.index, self.cache, self.is_first = index, cache, is_first
        self.next_index, self.guess = next_index, guess

    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """One token as the path for decoding computes it; several in waves."""
        if self.is_first:
            self.cache.now += 1
            self.cache.counts.tokens += len(x_TD)
        if len(x_TD) == 1 and routing.expert_ids_TK.shape[1] <= self.cache.num_slots:
            return self._one_token(x_TD, routing, activation)
        return experts_in_portions(x_TD, routing, self, partial(_computed, activation=activation))

    def hand_out(self, expert_ids: Sequence[int]) -> Iterator[Portion]:
        """Those that are here first; the others are read meanwhile, in waves that leave room for what is in use."""
        here = [e for e in expert_ids if self.cache.holds(self.index, e)]
        order = [*here, *(e for e in expert_ids if e not in set(here))]
        size = max(1, self.cache.num_slots // 2)
        waves = [order[at : at + size] for at in range(0, len(order), size)]
        coming = self.cache.ask(self.index, waves[0])
        for number, wave in enumerate(waves):
            slots = coming
            if number + 1 < len(waves) and 2 * size <= self.cache.num_slots:
                coming = self.cache.ask(self.index, waves[number + 1])
            for e, slot in zip(wave, slots, strict=True):
                self.cache.wait(slot)
                yield Portion([e], Experts(slot.gate_up[None], slot.down[None]))
                self.cache.release([slot])
            if number + 1 < len(waves) and 2 * size > self.cache.num_slots:
                coming = self.cache.ask(self.index, waves[number + 1])

    def _one_token(self, x_1D: Tensor, routing: Routing, activation: Activation) -> Tensor:
        chosen = routing.expert_ids_TK[0].tolist()
        slots = self.cache.ask(self.index, chosen)
        if self.guess is not None:
            self.cache.guess(self.next_index, self.guess(x_1D))
        x_D = x_1D[0]
        rows: list[Tensor | None] = [None] * len(chosen)
        is_here = [slot.ready.is_set() for slot in slots]
        for i in sorted(range(len(chosen)), key=lambda i: not is_here[i]):
            self.cache.wait(slots[i])
            rows[i] = torch.mv(slots[i].gate_up, x_D)
        gate_up_K2f = torch.stack([row for row in rows if row is not None])
        gate_Kf, up_Kf = gate_up_K2f.chunk(2, dim=-1)
        hidden_Kf = ACTIVATIONS[activation](gate_Kf).mul_(up_Kf).mul_(routing.weights_TK.to(x_D.dtype).t())
        y_D = torch.zeros_like(x_D)
        for slot, hidden_f in zip(slots, hidden_Kf.unbind(0), strict=True):
            y_D.addmv_(slot.down, hidden_f)
        self.cache.release(slots)
        return y_D[None]


def _computed(x_ND: Tensor, routing: Routing, experts: object, activation: Activation) -> Tensor:
    assert isinstance(experts, Experts)
    none = none_of(experts)
    assert isinstance(none, Experts)
    return apply_experts(x_ND, routing, experts, none, activation=activation)
