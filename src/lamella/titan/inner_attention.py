"""The attention kernels of the torchtitan home: sdpa under an explicit mask, FlexAttention, and varlen.

Under context parallelism a rank has the queries of its own tokens; sdpa and flex first gather the keys and values of
all tokens, in the order of `ContextShare.order`.

Shapes: B batch, L tokens (l of this rank), N query heads, G key/value heads, H head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.protocols.module import Module

from lamella.errors import UserError
from lamella.titan.context import all_keys
from lamella.titan.masks import Masks


class ScoreMod(Protocol):
    """FlexAttention's score of query `q` of `head` for key `k` of sample `b`, changed."""

    def __call__(self, score: Tensor, b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor: ...


class GathersKeys(Module):
    """An inner attention that can see the keys and values of other ranks' tokens."""

    key_group: dist.ProcessGroup | None = None
    """The ranks that share out the tokens of each sample; None: all tokens are here."""

    def share_keys(self, group: dist.ProcessGroup) -> None:
        """Gather keys and values over the ranks of `group` from now on."""
        self.key_group = group

    def gathered(self, k_BlGH: Tensor, v_BlGH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, G, H] of all tokens."""
        return (k_BlGH, v_BlGH) if self.key_group is None else all_keys(k_BlGH, v_BlGH, self.key_group)


class DocumentAttention(GathersKeys):
    """Scaled dot product attention under an explicit mask: runs, with its backward, on any device."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """Nothing to say: masks come with each call."""

        pass

    def __init__(self, config: Config):
        super().__init__()

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Tensor,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What this rank's queries attend to, [B, l, N, H]."""
        k_BLNH, v_BLNH = self.gathered(k_BLNH, v_BLNH)
        if enable_gqa and q_BLNH.device.type != "cpu":
            # under a mask, GPUs have no kernel for groups but the one that writes down [B, N, L, L] scores
            enable_gqa, (k_BLNH, v_BLNH) = False, (of_each_head(x, q_BLNH.shape[2]) for x in (k_BLNH, v_BLNH))
        q_BNLH, k_BNLH, v_BNLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        y_BNLH = F.scaled_dot_product_attention(
            q_BNLH, k_BNLH, v_BNLH, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
        )
        return y_BNLH.transpose(1, 2)


class GatheringFlexAttention(GathersKeys, FlexAttention):
    """torchtitan's FlexAttention, over the keys of all ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        """torchtitan's."""

        pass

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Masks = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        score_mod: ScoreMod | None = None,
    ) -> Tensor:
        """What this rank's queries attend to, [B, l, N, H]."""
        k_BLNH, v_BLNH = self.gathered(k_BLNH, v_BLNH)
        return super().forward(
            q_BLNH, k_BLNH, v_BLNH, attention_masks=attention_masks, score_mod=score_mod, scale=scale,
            enable_gqa=enable_gqa,
        )  # fmt: skip


def of_each_head(x_BLGH: Tensor, num_heads: int) -> Tensor:
    """The key or value head of every query head, [B, L, N, H]."""
    return x_BLGH.repeat_interleave(num_heads // x_BLGH.shape[2], dim=2)


def share_keys(inner: Module, group: dist.ProcessGroup) -> None:
    """Let an inner attention see the keys of all ranks of `group`; UserError for varlen, whose kernels cannot."""
    if not isinstance(inner, GathersKeys):
        raise UserError("parallel.context needs attention: flex or sdpa; varlen kernels want whole samples")
    inner.share_keys(group)


FLEX_LEAST_WIDTH = 16
"""Triton's products have no side below this."""
FLASH_MODULES = {9: "flash_attn_interface", 10: "flash_attn.cute"}
"""Major compute capability -> what torchtitan's varlen attention imports there; before 9, torch has kernels itself."""


def check_kernels(
    kind: str, head_width: int, precision: str, capability: int, is_installed: Callable[[str], bool] | None = None
) -> None:
    """Refuse an attention that a GPU has no kernels for.

    Args:
        kind: sdpa, flex or varlen.
        precision: of the computation, "float32" or "bfloat16".
        capability: the GPU's major compute capability.
        is_installed: whether a module can be imported; None: looked up.

    Raises:
        UserError: what is missing, and what to set.
    """
    if kind == "flex" and head_width < FLEX_LEAST_WIDTH:
        raise UserError(
            f"attention: flex needs heads of {FLEX_LEAST_WIDTH} or more features, this model's have {head_width}; "
            "set attention: sdpa"
        )
    if kind != "varlen":
        return
    if precision != "bfloat16":
        raise UserError(f"attention: varlen computes in bfloat16, not in {precision}; set attention: flex or sdpa")
    module = FLASH_MODULES[min(capability, max(FLASH_MODULES))] if capability >= min(FLASH_MODULES) else None
    if module is not None and not (is_installed or _is_installed)(module):
        raise UserError(
            f"attention: varlen needs FlashAttention's {module} on this GPU, which is not installed; "
            "set attention: flex"
        )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False


def inner_attention(kind: str, sliding_window: int | None) -> Module.Config:
    """The config of an inner attention.

    Args:
        kind: sdpa, flex or varlen.
        sliding_window: tokens that a token sees, itself among them; sdpa and flex have it in their masks.
    """
    if kind == "sdpa":
        return DocumentAttention.Config()
    if kind == "flex":
        return GatheringFlexAttention.Config()
    return VarlenAttention.Config(window_size=(-1 if sliding_window is None else sliding_window - 1, 0))
