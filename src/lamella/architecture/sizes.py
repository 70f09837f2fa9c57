"""Numbers that must fit each other: neurons and slices, query heads and attention experts."""

from __future__ import annotations

from typing import NamedTuple

from lamella.errors import UserError


def check_slices(ffn_width: int, slices: int) -> int:
    """Neurons per slice; UserError unless `slices` divides `ffn_width`."""
    if slices < 1 or ffn_width % slices:
        divisors = [s for s in range(2, 65) if ffn_width % s == 0]
        raise UserError(f"the FFN width {ffn_width} is not divisible by {slices} slices; choose one of {divisors}")
    return ffn_width // slices


def check_experts(num_experts: int, heads: int, kv_heads: int) -> None:
    """UserError unless every expert gets as many query heads, all of one key/value head."""
    if num_experts % kv_heads or heads % num_experts:
        fitting = [n for n in range(kv_heads, heads + 1, kv_heads) if heads % n == 0]
        raise UserError(
            f"{num_experts} attention experts do not fit {heads} query heads with {kv_heads} key/value heads; "
            f"possible: {', '.join(map(str, fitting))}"
        )


class Parts(NamedTuple):
    num_parts: int
    """G"""
    num_shared: int
    """s"""
    num_active: int
    """A, shared parts included"""

    @property
    def num_routed(self) -> int:
        """E"""
        return self.num_parts - self.num_shared

    @property
    def num_chosen(self) -> int:
        """K"""
        return self.num_active - self.num_shared


def check_parts(ffn_width: int, parts: Parts) -> int:
    """Neurons per part, f; UserError unless G divides F and 0 <= s < A <= G."""
    G, s, A = parts
    if G < 2 or ffn_width % G:
        choices = [g for g in range(2, 129) if ffn_width % g == 0]
        raise UserError(f"the FFN width {ffn_width} is not divisible into {G} parts; choose one of {choices}")
    if not 0 < A <= G:
        raise UserError(f"{A} of {G} parts cannot be active; choose 1 to {G}")
    if not 0 <= s < A:
        raise UserError(f"{s} shared parts leave no routed one of {A} active parts; choose 0 to {A - 1}")
    return ffn_width // G
