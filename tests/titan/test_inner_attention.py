"""Attention kernels: what a GPU lacks is refused, and what it has is asked for in a form that its kernels take."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torchtitan.models.common.attention import FlexAttention, QKVLinear, create_attention_mask
from torchtitan.models.common.linear import Linear

from lamella.architecture.moe import AttentionMoEConfig
from lamella.errors import UserError
from lamella.titan.attention import ExpertAttention, RoutedHeads
from lamella.titan.block import ScaledRoPE
from lamella.titan.inner_attention import DocumentAttention, check_kernels, inner_attention
from lamella.titan.masks import document_mask
from lamella.titan.moe import UNSET


@pytest.mark.parametrize(
    ("kind", "width", "precision", "capability", "message"),
    [
        ("flex", 8, "bfloat16", 9, "needs heads of 16 or more features, this model's have 8; set attention: sdpa"),
        ("varlen", 64, "float32", 9, "computes in bfloat16, not in float32; set attention: flex or sdpa"),
        ("varlen", 64, "bfloat16", 9, "needs FlashAttention's flash_attn_interface .* set attention: flex"),
        ("varlen", 64, "bfloat16", 12, "needs FlashAttention's flash_attn.cute"),
    ],
)
def test_kernels_that_are_not_there_are_refused(kind, width, precision, capability, message):
    with pytest.raises(UserError, match=message):
        check_kernels(kind, width, precision, capability, lambda module: False)


@pytest.mark.parametrize(
    ("kind", "width", "precision", "capability"),
    [("flex", 16, "float32", 9), ("sdpa", 8, "float32", 9), ("varlen", 64, "bfloat16", 8)],
)
def test_kernels_that_are_there_are_taken(kind, width, precision, capability):
    check_kernels(kind, width, precision, capability, lambda module: False)
    check_kernels("varlen", 64, "bfloat16", 9, lambda module: True)


class Calls(TorchFunctionMode):
    """Key heads and the word on groups of every attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.seen.append((args[1].shape[1], kwargs["enable_gqa"]))
        return function(*args, **kwargs)


@pytest.mark.parametrize(("device", "expected"), [("cpu", (2, True)), ("meta", (8, False))])
def test_groups_under_a_mask_are_spread_out_where_only_the_slow_kernel_takes_them(device, expected):
    attention = DocumentAttention.Config().build()
    q, k, v = (torch.randn(1, 32, heads, 16, device=device) for heads in (8, 2, 2))
    mask = document_mask(torch.arange(32, device=device)[None])
    with Calls() as calls:
        y = attention(q, k, v, attention_masks=mask, enable_gqa=True)
    assert (y.shape, calls.seen) == (q.shape, [expected])


def expert_attention(kind: str) -> ExpertAttention:
    D, N, G, H = 32, 8, 2, 16
    moe = AttentionMoEConfig(num_experts=4, num_experts_per_tok=2, layers=(0,))

    def linear(n_in: int, n_out: int) -> Linear.Config:
        return Linear.Config(in_features=n_in, out_features=n_out, bias=False, param_init=UNSET)

    config = ExpertAttention.Config(
        n_heads=N, n_kv_heads=G, dim=D, head_dim=H, wo=linear(N * H, D), qk_norm=None,
        qkv_linear=QKVLinear.Config(head_dim=H, wq=linear(D, N * H), wkv=linear(D, G * H)),
        inner_attention=inner_attention(kind, None), rope=ScaledRoPE.Config(dim=H, max_seq_len=32),
        heads=RoutedHeads.Config(dim=D, moe=moe, param_init=UNSET),
    )  # fmt: skip
    attention = config.build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(attention.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        attention.heads.router.selection_bias.zero_()
    return attention.eval()


@pytest.mark.slow
@torch.no_grad()
def test_flex_hides_unchosen_keys_without_wider_heads(monkeypatch):
    """Eager FlexAttention, which needs no compiler, against sdpa with the hiding feature."""
    monkeypatch.setattr(
        FlexAttention, "_compiled_flex_attn", staticmethod(lambda *qkv, **options: flex_attention(*qkv, **options))
    )
    x = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(20), torch.arange(12)]).expand(2, 32)
    by_sdpa = expert_attention("sdpa")(x, document_mask(positions), positions)
    flex, widths = expert_attention("flex"), []
    flex.inner_attention.register_forward_pre_hook(lambda _, inputs: widths.extend(t.shape[-1] for t in inputs))
    mask = document_mask(positions)
    block_mask = create_attention_mask(lambda b, h, q, k: mask[b, 0, q, k], 2, None, 32, 32, device="cpu")
    by_flex = flex(x, block_mask, positions)
    assert widths == [16, 16, 16]
    assert torch.allclose(by_flex, by_sdpa, atol=1e-5)  # fp32, another order of summation
    assert flex.heads.last_routing.expert_ids_TK.shape == (64, 2)
    everything = flex(x, block_mask, positions, "dense")
    assert not torch.allclose(by_flex, everything, atol=1e-2)
