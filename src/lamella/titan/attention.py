"""Attention experts in torchtitan: the heads of `GQAttention`, routed (`lamella.moe.attention.heads` defines them).

All heads are computed for all tokens, as in the definition, so training saves nothing; `lamella.moe.attention.routed`
computes routed rows alone, for generation. What an expert was not given is hidden from its queries by one more feature
of queries (1) and keys (0, or far below 0), so that every kernel, mask and context share of the dense attention serves
as it is. FlexAttention is told in its score function instead: its kernels round the width of a head up to a power of
two, and 128 + 8 to 256. (Under context parallelism keys of other ranks come with the feature.)

Shapes: B batch, L sequence, T = B*L tokens, D model width, N query heads, G key/value heads, E experts, H head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.models.common.attention import GQAttention
from torchtitan.protocols.module import Module

from lamella.architecture.moe import AttentionMoEConfig, Mode
from lamella.moe.attention.heads import attention_scores, expert_weights, fixed_attention_routing, route_attention
from lamella.titan.inner_attention import GatheringFlexAttention, ScoreMod
from lamella.titan.masks import Masks
from lamella.titan.routed import Routed, Router

MORE_FEATURES = 8
"""Of which one is used: kernels want head widths in eights."""
UNSEEN = -30000.0
"""Times H**-0.5 it leaves no probability in any dtype. Finite: rows that see nothing else count with weight 0."""


class RoutedHeads(Routed):
    """Chooses among the experts of an attention; the heads themselves stay the dense attention's."""

    moe: AttentionMoEConfig

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """What the routing needs to know."""

        dim: int
        moe: AttentionMoEConfig

    def __init__(self, config: Config):
        super().__init__(config.moe)
        self.router = Router.Config(dim=config.dim, moe=config.moe, param_init=config.param_init).build()

    def forward(self, x_BLD: Tensor, mode: Mode = "routed") -> tuple[Tensor, Tensor, Tensor]:
        """Route every token.

        Returns:
            (x, with the auxiliary loss in its graph; bool [B, L, E], what is chosen; [B, L, E] weights, 0 where not).
        """
        B, L, _ = x_BLD.shape
        x_TD, router = x_BLD.flatten(0, 1), self.router
        if mode != "routed":
            routing = fixed_attention_routing(B * L, mode, self.moe, x_BLD.device)
        else:
            scores_TE = attention_scores(x_TD, router.weight, self.moe)
            routing = route_attention(scores_TE, router.selection_bias, self.moe, router.gate_scale)
            if self.training:
                self.gather(routing, scores_TE)
                x_BLD = self.add_auxiliary_loss(x_BLD, routing, scores_TE)
        self.last_routing = routing.detached()
        chosen_TE, weights_TE = expert_weights(routing, self.moe.num_experts)
        return x_BLD, chosen_TE.view(B, L, -1), weights_TE.view(B, L, -1)


class ExpertAttention(GQAttention):
    """Attention whose heads are experts. It maps [B, L, D] to [B, L, D]."""

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        """The dense attention's config, and that of the routing."""

        heads: RoutedHeads.Config

    def __init__(self, config: Config):
        super().__init__(config)
        self.heads = config.heads.build()

    def forward(
        self, x_BLD: Tensor, attention_masks: Masks, positions: Tensor | None = None, mode: Mode = "routed"
    ) -> Tensor:
        """The attention's output [B, L, D]; masks and positions are those of the dense attention."""
        x_BLD, chosen_BLE, weights_BLE = self.heads(x_BLD, mode)
        q_BLNH, k_BLGH, v_BLGH = self.qkv_linear(x_BLD)
        if self.q_norm is not None and self.k_norm is not None:
            q_BLNH, k_BLGH = self.q_norm(q_BLNH), self.k_norm(k_BLGH)
        q_BLNH, k_BLGH = self.rope(q_BLNH, k_BLGH, positions)
        E = chosen_BLE.shape[-1]
        if isinstance(self.inner_attention, GatheringFlexAttention) and self.inner_attention.key_group is None:
            out_BLNH = self.inner_attention(
                q_BLNH, k_BLGH, v_BLGH, attention_masks=attention_masks, scale=self.head_dim**-0.5,
                enable_gqa=self.n_heads > self.n_kv_heads, score_mod=unseen_score(chosen_BLE, self.n_heads // E),
            )  # fmt: skip
        else:
            k_BLEH, v_BLEH = (x.repeat_interleave(E // self.n_kv_heads, dim=2) for x in (k_BLGH, v_BLGH))
            q, k, v = hide_unchosen(q_BLNH, k_BLEH, v_BLEH, chosen_BLE)
            out_BLNH = self.inner_attention(
                q, k, v, attention_masks=attention_masks, scale=self.head_dim**-0.5, enable_gqa=self.n_heads > E
            )[..., : self.head_dim]
        weights_BLN = weights_BLE.repeat_interleave(self.n_heads // E, dim=2).to(out_BLNH.dtype)
        return self.wo((out_BLNH * weights_BLN[..., None]).flatten(2))


def unseen_score(chosen_BLE: Tensor, heads_per_expert: int) -> ScoreMod:
    """Leaves a head's score for the keys that its expert was given, and puts it far below for the others."""

    def score_mod(score: Tensor, b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where(chosen_BLE[b, k, head // heads_per_expert], score, UNSEEN)

    return score_mod


def hide_unchosen(q_BLNH: Tensor, k_BLEH: Tensor, v_BLEH: Tensor, chosen_BLE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with `MORE_FEATURES` more: q k is as before for a key that its expert was given, far
    below else.
    """
    q, k, v = (F.pad(x, (0, MORE_FEATURES)) for x in (q_BLNH, k_BLEH, v_BLEH))
    q[..., -1] = 1.0
    k[..., -1] = UNSEEN * (~chosen_BLE).to(k.dtype)
    return q, k, v
