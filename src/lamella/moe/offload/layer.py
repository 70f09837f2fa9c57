"""The experts of one layer, asked of the cache of all: what `lamella.moe.experts` computes with.

Shapes: T tokens, D model width, E experts (frozen ones first), K active experts, R router rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from lamella.architecture.moe import Activation
from lamella.moe.offload.cache import ExpertCache
from lamella.moe.packed import Experts
from lamella.moe.paths.choose import apply_experts
from lamella.moe.paths.decode import add_down
from lamella.moe.provider import ExpertComputer, Portion, experts_in_portions, none_of
from lamella.moe.quantised import Quantised
from lamella.moe.routing import Routing
from lamella.moe.routing_one import Chosen

Guess = Callable[[Tensor], list[int]]
"""Of the input [1, D] of a layer's experts, which experts the next layer will ask for."""


class OffloadedExperts(ExpertComputer):
    """Experts of layer `index`.

    Args:
        is_first: whether a token's way through the experts begins here.
        guess: of the next MoE layer, whose index is `next_index`; None: nothing is read ahead.
        slices: the frozen experts where they are all in memory, in fewer bytes; the cache has the trainable ones.
    """

    def __init__(
        self,
        index: int,
        cache: ExpertCache,
        is_first: bool,
        next_index: int = 0,
        guess: Guess | None = None,
        slices: Quantised | None = None,
    ):
        self.index, self.cache, self.is_first = index, cache, is_first
        self.next_index, self.guess, self.slices = next_index, guess, slices
        self.first_cached = 0 if slices is None else len(slices.gate_up)
        """The experts before are not the cache's."""

    def compute(self, x_TD: Tensor, routing: Routing, activation: Activation = "silu") -> Tensor:
        """One token as the path for decoding computes it; several in waves."""
        if len(x_TD) == 1 and routing.expert_ids_TK.shape[1] <= self.cache.num_slots:
            y_TD = torch.zeros_like(x_TD)
            chosen = Chosen(routing.expert_ids_TK[0].tolist(), routing.weights_TK[0].tolist())
            self.add_one(y_TD[0], x_TD[0], chosen, activation)
            return y_TD
        if self.is_first:
            self._count(len(x_TD))
        y_TD = experts_in_portions(x_TD, routing, self, partial(_computed, activation=activation))
        return y_TD if self.slices is None else y_TD + self.slices.compute(x_TD, routing, activation)

    def hand_out(self, expert_ids: Sequence[int]) -> Iterator[Portion]:
        """Those that are here first; the others are read meanwhile, in waves that leave room for what is in use."""
        expert_ids = [e for e in expert_ids if e >= self.first_cached]
        if not expert_ids:
            return
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

    def add_one(self, y_D: Tensor, x_D: Tensor, chosen: Chosen, activation: Activation = "silu") -> None:
        """As the path for decoding computes it; what is here is multiplied while the others are read."""
        if self.is_first:
            self._count(1)
        if self.slices is not None:
            self.slices.add_one(y_D, x_D, chosen, activation)
            chosen = chosen.within(self.first_cached, 1 << 30)
        slots = self.cache.ask(self.index, chosen.expert_ids)
        if self.guess is not None:
            self.cache.guess(self.next_index, [e for e in self.guess(x_D[None]) if e >= self.first_cached])
        if not slots:
            return
        is_here = [slot.ready.is_set() for slot in slots]
        rows: list[Tensor] = [x_D] * len(slots)
        for k in sorted(range(len(slots)), key=lambda k: not is_here[k]):
            self.cache.wait(slots[k])
            rows[k] = torch.mv(slots[k].gate_up, x_D)
        add_down(y_D, torch.stack(rows), chosen.weights, [slot.down for slot in slots], activation)
        self.cache.release(slots)

    def _count(self, num_tokens: int) -> None:
        self.cache.now += 1
        self.cache.counts.tokens += num_tokens


def _computed(x_ND: Tensor, routing: Routing, experts: object, activation: Activation) -> Tensor:
    assert isinstance(experts, Experts)
    none = none_of(experts)
    assert isinstance(none, Experts)
    return apply_experts(x_ND, routing, experts, none, activation=activation)
