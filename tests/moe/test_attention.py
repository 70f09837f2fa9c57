"""Attention experts as tensor functions: routed rows alone against the masked definition, values and gradients.

Shapes: B sequences, L tokens, D width, E experts, H head width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lamella.architecture.moe import AttentionMoEConfig
from lamella.architecture.sizes import check_experts
from lamella.errors import UserError
from lamella.moe.attention.heads import (
    AttentionWeights,
    Context,
    Projection,
    attend_masked,
    attention_scores,
    expert_norms,
    expert_weights,
    fixed_attention_routing,
    rotated,
    route_attention,
)
from lamella.moe.attention.ragged import Keys
from lamella.moe.attention.routed import attend_routed
from lamella.moe.routing import Routing

B, L, D, H, HEADS, KV_HEADS = 2, 9, 24, 4, 8, 2
# Outputs of size about 1, sums of at most 24 fp32 terms in another order: a few roundings of 1e-7.
FP32 = {"atol": 2e-6, "rtol": 1e-5}
# (experts, chosen): one per key/value head, finer ones that share a head, a single head each, all chosen
SIZES = [(2, 1), (4, 3), (8, 3), (8, 8)]


def weights(num_experts: int, bias: bool = True, norm: bool = True) -> AttentionWeights:
    torch.manual_seed(0)
    sizes = ((HEADS * H, D), (KV_HEADS * H, D), (KV_HEADS * H, D), (D, HEADS * H))
    projections = [
        Projection(
            (torch.randn(size) * 0.4).requires_grad_(), (torch.randn(size[0]) * 0.4).requires_grad_() if bias else None
        )
        for size in sizes
    ]
    scale = torch.rand(H) + 0.5
    norms = [lambda x: torch.nn.functional.rms_norm(x, (H,), scale)] * 2 if norm else [None, None]
    return AttentionWeights(*projections, H, num_experts, *norms)


def rope(position_BL: Tensor) -> tuple[Tensor, Tensor]:
    angle_BLH = position_BL[..., None] * torch.tensor([1.0, 0.3]).repeat(2)
    return angle_BLH.cos(), angle_BLH.sin()


def random_routing(num_experts: int, chosen: int, tokens: int = B * L) -> Routing:
    generator = torch.Generator().manual_seed(1)
    ids = torch.rand(tokens, num_experts, generator=generator).topk(chosen).indices
    return Routing(ids, torch.rand(ids.shape, generator=generator) + 0.5)


def plain() -> Context:
    return Context(*rope(torch.arange(L).expand(B, L)))


def windowed() -> Context:
    return plain()._replace(window=4)


def left_padded() -> Context:
    start = torch.tensor([0, 5])[:, None]
    position = (torch.arange(L) - start).clamp(min=0)
    seen = torch.arange(L)[None, None] >= start[..., None]
    return Context(*rope(position), mask_BLS=seen & (torch.arange(L)[:, None] >= torch.arange(L)))


def packed() -> Context:
    """Two documents in a sequence, positions from 0 in each."""
    document = torch.stack([torch.arange(L) >= 3, torch.arange(L) >= 6]).long()
    position = torch.arange(L) - document * torch.tensor([[3], [6]])
    same = document[:, :, None] == document[:, None]
    return Context(*rope(position), mask_BLS=same & (torch.arange(L)[:, None] >= torch.arange(L)))


def windowed_and_padded() -> Context:
    context = left_padded()
    assert context.mask_BLS is not None
    near = torch.arange(L)[:, None] - torch.arange(L) < 3
    return context._replace(mask_BLS=context.mask_BLS & near, window=3)


CONTEXTS = [plain, windowed, left_padded, packed, windowed_and_padded]


def with_gradients(attend, w: AttentionWeights, x_BLD: Tensor, routing: Routing, context: Context) -> list[Tensor]:
    leaves = [x_BLD, routing.weights_TK, *(p for projection in w[:4] for p in projection if p is not None)]
    leaves[:2] = [leaf.clone().requires_grad_() for leaf in leaves[:2]]
    y_BLD = attend(leaves[0], w, Routing(routing.expert_ids_TK, leaves[1]), context)
    direction = torch.randn(y_BLD.shape, generator=torch.Generator().manual_seed(2))
    return [y_BLD.detach(), *torch.autograd.grad((y_BLD * direction).sum(), leaves)]


@pytest.mark.parametrize("context", CONTEXTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("num_experts", "chosen"), SIZES)
def test_routed_rows_alone_are_the_masked_definition(num_experts: int, chosen: int, context) -> None:
    w, routing = weights(num_experts), random_routing(num_experts, chosen)
    x_BLD = torch.randn(B, L, D)
    expected = with_gradients(attend_masked, w, x_BLD, routing, context())
    got = with_gradients(attend_routed, w, x_BLD, routing, context())
    for ours, theirs in zip(got, expected, strict=True):
        # gradients add up B * L = 18 tokens more
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        assert ours.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_all_experts_with_weight_one_are_dense_attention(bias: bool) -> None:
    w, context = weights(4, bias, norm=False), plain()
    x_BLD = torch.randn(B, L, D)
    q, k, v = (torch.nn.functional.linear(x_BLD, *p).unflatten(-1, (-1, H)).transpose(1, 2) for p in w[:3])
    q, k = (rotated(x, context.cos_BLH[:, None], context.sin_BLH[:, None]) for x in (q, k))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    dense = torch.nn.functional.linear(out.transpose(1, 2).flatten(2), *w.o)
    config = AttentionMoEConfig((0,), 4, 4)
    scores_TE = attention_scores(x_BLD.flatten(0, 1), torch.randn(4, D), config)
    routing = route_attention(scores_TE, torch.zeros(4), config, torch.zeros(4))
    torch.testing.assert_close(attend_routed(x_BLD, w, routing, context), dense, **FP32)
    torch.testing.assert_close(attend_masked(x_BLD, w, routing, context), dense, **FP32)


@pytest.mark.faults
def test_an_expert_without_tokens_and_a_call_of_padding_alone() -> None:
    w, x_BLD = weights(4), torch.randn(B, L, D)
    ids = torch.tensor([[0, 1]]).expand(B * L, 2)
    routing = Routing(ids, torch.ones(ids.shape))
    expected = attend_masked(x_BLD, w, routing, plain())
    torch.testing.assert_close(attend_routed(x_BLD, w, routing, plain()), expected, **FP32)
    nothing = plain()._replace(mask_BLS=torch.zeros(B, L, L, dtype=torch.bool))
    bias_BLD = w.o.bias.expand(B, L, D)
    torch.testing.assert_close(attend_routed(x_BLD, w, routing, nothing), bias_BLD)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("num_experts", "chosen"), SIZES[:3])
def test_in_pieces_with_remembered_keys(num_experts: int, chosen: int, window: int | None) -> None:
    w, routing = weights(num_experts), random_routing(num_experts, chosen)
    x_BLD, whole = torch.randn(B, L, D), plain()._replace(window=window)
    kept: list[Keys] = []

    def remember(new: Keys) -> Keys:
        kept[:] = [kept[0].followed_by(new) if kept else new]
        return kept[0]

    parts = []
    for start, end in pairwise((0, 4, 5, L)):
        ids = torch.arange(B * L).view(B, L)[:, start:end].flatten()
        part = Routing(routing.expert_ids_TK[ids], routing.weights_TK[ids])
        context = Context(whole.cos_BLH[:, start:end], whole.sin_BLH[:, start:end], None, window, seen=start)
        parts.append(attend_routed(x_BLD[:, start:end], w, part, context, remember))
    torch.testing.assert_close(torch.cat(parts, dim=1), attend_masked(x_BLD, w, routing, whole), **FP32)
    chosen_TE, _ = expert_weights(routing, num_experts)
    # one key per key/value head and token, however many of its experts were given the token
    assert len(kept[0].key_NH) == chosen_TE.unflatten(1, (KV_HEADS, -1)).any(2).sum()


def test_routing_breaks_ties_by_index_and_weighs_as_configured() -> None:
    x_TD, zero_ED = torch.randn(5, D), torch.zeros(4, D)
    unit = AttentionMoEConfig((0,), 4, 2)
    routing = route_attention(attention_scores(x_TD, zero_ED, unit), torch.zeros(4), unit, torch.zeros(4))
    assert routing.expert_ids_TK.tolist() == [[0, 1]] * 5
    assert (routing.weights_TK == 1).all()
    bias_E = torch.tensor([0.0, 0.0, 1.0, 0.5])
    biased = route_attention(attention_scores(x_TD, zero_ED, unit), bias_E, unit, torch.ones(4))
    assert biased.expert_ids_TK.tolist() == [[2, 3]] * 5  # the bias selects,
    assert (biased.weights_TK == 1 + 0.5).all()  # but never weighs: 1 + u sigmoid(0)
    soft = AttentionMoEConfig((0,), 4, 2, gate="softmax", route_scale=3.0)
    weights_TK = route_attention(attention_scores(x_TD, torch.randn(4, D), soft), torch.zeros(4), soft).weights_TK
    torch.testing.assert_close(weights_TK.sum(1), torch.full((5,), 3.0))
    assert fixed_attention_routing(5, "dense", unit, x_TD.device).expert_ids_TK.shape == (5, 4)
    random = fixed_attention_routing(200, "random", unit, x_TD.device).expert_ids_TK
    assert random.shape == (200, 2)
    assert (random[:, 0] != random[:, 1]).all()
    assert random.unique().tolist() == [0, 1, 2, 3]


def test_expert_norms() -> None:
    heads_TA, o_DA = torch.randn(5, HEADS * H), torch.randn(D, HEADS * H)
    norms_TE = expert_norms(heads_TA, o_DA, 4)
    second = heads_TA[:, 8:16] @ o_DA[:, 8:16].T
    torch.testing.assert_close(norms_TE[:, 1], second.pow(2).sum(1).sqrt())
    assert math.prod(norms_TE.shape) == 20


@pytest.mark.parametrize(
    ("experts", "heads", "kv_heads", "possible"), [(4, 9, 3, "3, 9"), (3, 8, 2, "2, 4, 8"), (16, 8, 8, "8")]
)
def test_experts_must_fit_the_heads(experts: int, heads: int, kv_heads: int, possible: str) -> None:
    with pytest.raises(UserError, match=f"possible: {possible}$"):
        check_experts(experts, heads, kv_heads)
