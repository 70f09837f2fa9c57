"""A layer whose experts are not all in memory computes what it computes with all of them there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from lamella.architecture.moe import MoEConfig
from lamella.errors import UserError
from lamella.hf.blocks import MoELayer
from lamella.moe.experts import MoEWeights, Resident, moe_ffn
from lamella.moe.lora import Lora
from lamella.moe.packed import Experts
from lamella.moe.provider import AnyExperts, Portion
from lamella.moe.two_matrix import TwoMatrixExperts

S, T, D, f = 4, 37, 16, 24


class Stored:
    """Hands out `at_once` experts at a time out of a store, always in the same memory, which it spoils afterwards."""

    def __init__(self, frozen: AnyExperts, trainable: AnyExperts, at_once: int = 1, backwards: bool = False):
        self.store = type(frozen)._make(torch.cat(pair) for pair in zip(frozen, trainable, strict=True))
        self.memory = type(frozen)._make(torch.full_like(t[:at_once], torch.nan) for t in self.store)
        self.at_once, self.backwards = at_once, backwards
        self.asked: list[list[int]] = []

    def hand_out(self, expert_ids: Sequence[int]) -> Iterator[Portion]:
        self.asked.append(list(expert_ids))
        order = list(expert_ids)[::-1] if self.backwards else list(expert_ids)
        for start in range(0, len(order), self.at_once):
            ids = order[start : start + self.at_once]
            for memory, stored in zip(self.memory, self.store, strict=True):
                memory[: len(ids)].copy_(stored[ids])
            yield Portion(ids, type(self.store)._make(t[: len(ids)] for t in self.memory))
            for memory in self.memory:
                memory.fill_(torch.nan)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def experts(gated: bool, seed: int) -> AnyExperts:
    if gated:
        return Experts(random(S, 2 * f, D, seed=seed), random(S, D, f, seed=seed + 1))
    return TwoMatrixExperts(random(S, f, D, seed=seed), random(S, f, seed=seed + 1), random(S, D, f, seed=seed + 2))


def config(gated: bool, routing: str = "flat", top_k: int = 2) -> MoEConfig:
    activation = "silu" if gated else "gelu"
    return MoEConfig(S, S, f, top_k, (0,), routing, route_scale=2.0, gated=gated, activation=activation)  # type: ignore[arg-type]


def bias_against(*closed: int) -> Tensor:
    """A selection bias with which no token chooses these experts (flat routing)."""
    bias_E = torch.zeros(2 * S)
    bias_E[list(closed)] = -100.0
    return bias_E


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "two matrices"])
@torch.no_grad()
def test_one_by_one_and_only_those_chosen(gated: bool) -> None:
    """Ascending experts one at a time are added up as the CPU's path adds them: equal to the bit."""
    frozen, trainable, router_ED = experts(gated, 10), experts(gated, 20), random(2 * S, D, seed=1)
    stored, bias_E = Stored(frozen, trainable), bias_against(1, 2, 6)
    x_TD = random(T, D, seed=2)
    expected, routing, _ = moe_ffn(x_TD, MoEWeights(router_ED, bias_E, Resident(frozen, trainable)), config(gated))
    actual, _, _ = moe_ffn(x_TD, MoEWeights(router_ED, bias_E, stored), config(gated))
    assert torch.equal(actual, expected)
    assert stored.asked == [[0, 3, 4, 5, 7]] == [routing.expert_ids_TK.unique().tolist()]


@pytest.mark.parametrize("tokens", [1, T], ids=["decoding", "prefill"])
@pytest.mark.parametrize("mode", ["routed", "dense", "learned"])
@torch.no_grad()
def test_in_any_portions_and_order(tokens: int, mode: str) -> None:
    frozen, trainable, router_SD = experts(True, 10), experts(True, 20), random(S, D, seed=1)
    stored = Stored(frozen, trainable, at_once=3, backwards=True)
    x_TD, twin = random(tokens, D, seed=2), config(True, "twin", S)
    expected, actual = (
        moe_ffn(x_TD, MoEWeights(router_SD, torch.zeros(S), provider), twin, mode)[0]  # type: ignore[arg-type]
        for provider in (Resident(frozen, trainable), stored)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # fp32, outputs below 1, another order of 4 terms
    if mode != "routed":
        assert stored.asked == [list(range(S)) if mode == "dense" else list(range(S, 2 * S))]


@torch.no_grad()
def test_a_layer_of_transformers_takes_another_provider() -> None:
    class Elsewhere(nn.Module):
        """What an offloaded layer has in the place of its packed experts."""

        def __init__(self, provider: Stored):
            super().__init__()
            self.provider = provider

    layer = MoELayer(D, config(True))
    for parameter, seed in zip(layer.parameters(), range(9), strict=False):
        parameter.copy_(random(*parameter.shape, seed=seed))
    layer.router.selection_bias.copy_(bias_against(0))
    x_BLD = random(2, 5, D, seed=3)
    expected = layer(x_BLD)
    stored = Stored(layer.experts.frozen, layer.experts.trainable)
    layer.experts = Elsewhere(stored)
    assert torch.equal(layer(x_BLD), expected)
    assert 0 not in stored.asked[0]


def test_low_rank_deltas_need_their_experts_in_memory() -> None:
    frozen, trainable = experts(True, 10), experts(True, 20)
    lora = Lora(random(S, 4, D, seed=1), random(S, 2 * f, 2, seed=2), random(S, 2, f, seed=3), random(S, D, 2, seed=4))
    weights = MoEWeights(random(2 * S, D, seed=1), torch.zeros(2 * S), Stored(frozen, trainable), lora=lora)
    with pytest.raises(UserError, match="keep them in memory"):
        moe_ffn(random(T, D, seed=2), weights, config(True))


@torch.no_grad()
def test_a_resident_provider_hands_out_its_own_tensors() -> None:
    frozen, trainable = experts(True, 10), experts(True, 20)
    first, second = Resident(frozen, trainable).hand_out([0, 5])
    assert (list(first.ids), list(second.ids)) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert first.experts is frozen
    assert second.experts is trainable
